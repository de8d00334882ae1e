"""`megalm <command>`: each command lives beside what it does (`add_arguments` and `run`), imported when called."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from megalm import __version__
from megalm.errors import ConfigError, MegalmError
from megalm.processes import importing, outlive_readers
from megalm.storage.faults import unforeseen

_COMMANDS = {
    "corpus": (
        "megalm.data.tools.corpus",
        "write the standard library's own text as JSONL (a corpus that needs no download)",
    ),
    "train-tokenizer": ("megalm.data.tools.train_tokenizer", "train a sentencepiece tokenizer"),
    "preprocess": ("megalm.data.preprocess", "turn text into indexed datasets (.bin and .idx)"),
    "submit": ("megalm.launching.submit", "train as a SLURM job, or by another launcher's exact command"),
    "doctor": ("megalm.doctor.command", "say what this machine, or these ranks, can do: one page for a bug report"),
    "inspect": ("megalm.data.tools.inspect", "show what an indexed dataset holds"),
    "verify": ("megalm.data.tools.verify", "check every byte of an indexed dataset"),
    "merge": ("megalm.data.tools.merge", "join indexed datasets into one"),
    "split": ("megalm.data.tools.split", "cut an indexed dataset into several"),
    "checkpoint": ("megalm.commands.checkpoint", "list, verify, describe, thin out or copy the checkpoints of a run"),
    "convert": ("megalm.commands.convert", "from and to models of Hugging Face's transformers"),
    "generate": ("megalm.commands.generate", "continue a prompt with a trained model"),
    "show-sample": ("megalm.commands.show_sample", "print samples of a run: what its model reads, sees and is to say"),
    "translate": (
        "megalm.commands.translate",
        "turn a shell script of Megatron or YAML of GPT-NeoX into a recipe, and say what became of each setting",
    ),
    "plan": ("megalm.planner.command", "say what a run needs: memory, communication, pipeline bubble; starts nothing"),
    "kernels": ("megalm.kernels.building.command", "build the fused kernels, or say what a run would use"),
    "shipped": (
        "megalm.shipped",
        "print the folder of what comes with megalm: recipes, DeepSpeed JSONs, launch scripts, kernels' sources",
    ),
    "report": ("megalm.commands.report", "say how a run went: losses, checkpoint, a sample, how to continue"),
}
"""Command -> (module with add_arguments and run, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A MegalmError is one line on stderr and the error's exit code."""
    outlive_readers()
    argv = list(sys.argv[1:] if argv is None else argv)
    with importing():
        arguments, rest = _parser(argv[0] if argv and argv[0] in _COMMANDS else None).parse_known_args(argv)
        module = importlib.import_module(_COMMANDS[arguments.command][0])
    arguments.words = argv
    takes_run_flags = getattr(module, "TAKES_RUN_FLAGS", False)
    try:
        if rest and not takes_run_flags:
            raise ConfigError(_unknown(module, rest))
        return int(module.run(arguments, rest) if takes_run_flags else module.run(arguments))
    except MegalmError as error:
        print(f"megalm {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"megalm {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if (refused := unforeseen(error)) is None:
            raise
        print(f"megalm {arguments.command}: error: {refused}", file=sys.stderr)
        return refused.exit_code


def _unknown(module: ModuleType, words: Sequence[str]) -> list[str]:
    """What to say about words that a command does not know; its PEER_FLAGS are flags of other programs."""
    from megalm.config.merging.suggest import did_you_mean

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    known = [option for action in parser._actions for option in action.option_strings]
    peers: dict[str, str] = getattr(module, "PEER_FLAGS", {})
    found = []
    for flag in dict.fromkeys(word.split("=")[0] for word in words if word.startswith("--")):
        if flag in peers:
            found.append(f"{flag} is known elsewhere but not here; {peers[flag]}")
        else:
            found.append(f"{flag} is not known{did_you_mean(flag, known) or '; see --help'}")
    return found or [f"{' '.join(words)}: not expected; see --help"]


def _parser(called: str | None) -> argparse.ArgumentParser:
    """The parser; only the called command's module is imported for its arguments."""
    parser = argparse.ArgumentParser(prog="megalm", description="Large-scale training of language models.")
    parser.add_argument("--version", action="version", version=f"megalm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        description = text[0].upper() + text[1:] + "."
        command = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
        if name == called:
            importlib.import_module(module).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
