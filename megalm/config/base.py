"""What every configuration section shares: frozen, keyword-only, checked when built, help text under each field."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class OpenChoice:
    """Names that a setting knows by itself; modules of --import-module may add others.

    Stands in the annotation of a field: `Annotated[str, OpenChoice(("adam", "lion"))]`.
    """

    names: tuple[str, ...]


def as_list(value: object) -> object:
    """A single word as a list of one, for settings that take several."""
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """One section of the run configuration.

    Field names are Megatron's flag names with underscores (`num_layers` is `--num-layers`); the string under a
    field is its help text. Building a section checks types and ranges (`pydantic.ValidationError`).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
