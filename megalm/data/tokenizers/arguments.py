"""The tokenizer's flags, the same for every command."""

import argparse

from pydantic import ValidationError

from megalm.config.data import TokenizerConfig
from megalm.config.merging.settings import rule
from megalm.config.ranges import Range
from megalm.data.tokenizers.build import TOKENIZERS
from megalm.errors import ConfigError
from megalm.tables import import_modules


def add_tokenizer_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds a flag for each field of TokenizerConfig, with Megatron's names, and --import-module."""
    for name, info in TokenizerConfig.model_fields.items():
        kind: Range | type[str] = Range(0) if info.annotation == (int | None) else str
        aliases = ["--vocab-size"] if name == "tokenizer_vocab_size" else []
        parser.add_argument("--" + name.replace("_", "-"), *aliases, type=kind, metavar="X", help=info.description)
    parser.add_argument(
        "--import-module", action="append", default=[], metavar="M", help="Module that adds a tokenizer (repeatable)."
    )


def tokenizer_config(arguments: argparse.Namespace, problems: list[str]) -> TokenizerConfig:
    """The settings that the flags give; what is wrong with them is added to `problems`.

    Raises:
        ConfigError: a module of --import-module cannot be imported.
    """
    import_modules(arguments.import_module)
    given = {name: getattr(arguments, name) for name in TokenizerConfig.model_fields}
    try:
        config = TokenizerConfig(**given)
        if config.tokenizer_type is not None:
            TOKENIZERS[config.tokenizer_type]
        return config
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + str(problem["loc"][0]).replace("_", "-")
            problems.append(f"{flag} {problem['input']} {rule(problem['msg'])}")
    except ConfigError as error:
        problems += [problem.replace("tokenizer_type=", "--tokenizer-type ", 1) for problem in error.problems]
    return TokenizerConfig()
