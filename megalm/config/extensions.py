"""What a run takes from outside the package."""

from typing import Annotated

from pydantic import BeforeValidator

from megalm.config.base import Section, as_list


class ExtensionsConfig(Section):
    """Modules of the user's own."""

    import_module: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Modules to import before the run is built, such as my_package.my_objective: they add their own objectives, model
    families, optimizers, sinks or tokenizers to megalm's tables (docs/contributing.md)."""
