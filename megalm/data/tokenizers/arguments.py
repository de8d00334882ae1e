"""The tokenizer's flags, the same for every command."""

import argparse
from typing import get_args

from pydantic import ValidationError

from megalm.config.data import TokenizerConfig, TokenizerType
from megalm.config.merging.suggest import did_you_mean


def add_tokenizer_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds a flag for each field of TokenizerConfig, with Megatron's names."""
    for name, info in TokenizerConfig.model_fields.items():
        kind = int if info.annotation == (int | None) else str
        aliases = ["--vocab-size"] if name == "tokenizer_vocab_size" else []
        parser.add_argument("--" + name.replace("_", "-"), *aliases, type=kind, metavar="X", help=info.description)


def tokenizer_config(arguments: argparse.Namespace, problems: list[str]) -> TokenizerConfig:
    """The settings that the flags give; what is wrong with them is added to `problems`."""
    given = {name: getattr(arguments, name) for name in TokenizerConfig.model_fields}
    try:
        return TokenizerConfig(**given)
    except ValidationError as error:
        kinds = get_args(TokenizerType)
        for problem in error.errors():
            flag, value = "--" + str(problem["loc"][0]).replace("_", "-"), problem["input"]
            problems.append(f"{flag} {value}: {problem['msg']}{did_you_mean(str(value), kinds)}")
        return TokenizerConfig()
