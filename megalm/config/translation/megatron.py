"""Shell scripts of Megatron-LM and Megatron-DeepSpeed."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from megalm.config.merging.flags import build_parser, parse_flags
from megalm.config.merging.nothing import NO_EFFECT
from megalm.config.merging.settings import SETTINGS
from megalm.config.translation.shell import PLACEHOLDER, training_command
from megalm.config.translation.table import Fate, Translation

_NUMBER = re.compile(r"-[\d.]")
_NAME = re.compile(r"[A-Z][A-Z0-9_]*[A-Z0-9]")


def from_shell(text: str, source: str) -> Translation:
    """The translation of a script that starts Megatron's training.

    Raises:
        ConfigError: it starts none, or what is understood of it is no run.
    """
    words, notes = training_command(text)
    script = next(index for index, word in enumerate(words) if re.search(r"pretrain_\w+(\.py)?$", word))
    found = Translation(source, notes=notes)
    for group in _groups(words[:script]):
        if group[0].startswith("--"):
            found.add(" ".join(group), "launch", "give it to the launcher, or to `megalm submit`")
    parser = build_parser()
    _of_script(words[script], found)
    for group in _groups(words[script + 1 :]):
        _translate(group, found, parser, Path(source).parent)
    _defaults(found)
    found.settle()
    return found


_BERT = {
    "model_family": "bert",
    "objective": "masked",
    "norm_order": "pre",
    "norm_epsilon": 1e-5,
    "embedding_norm": False,
}
"""Megatron's BERT normalizes as its GPT does."""


def _of_script(script: str, found: Translation) -> None:
    """What the script's name says of its model."""
    if "pretrain_bert" in script:
        for name, value in _BERT.items():
            found.give(f"({script})", name, value, "written")


def _groups(words: list[str]) -> Iterator[list[str]]:
    """Each flag with the values after it."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") or (word.startswith("-") and not _NUMBER.match(word)):
            if group:
                yield group
            flag, equals, value = word.partition("=")
            group = [flag, value] if equals else [word]
        elif group:
            group.append(word.strip("'"))
    if group:
        yield group


def _translate(group: list[str], found: Translation, parser: argparse.ArgumentParser, folder: Path) -> None:
    """What becomes of a flag and its values."""
    flag, *values = group
    theirs = " ".join(group)
    name = flag.lstrip("-").replace("_", "-")
    if name == "deepspeed-config" and values and (folder / values[0]).is_file():
        values = [str(folder / values[0])]
    elif name in ("deepspeed-config", "deepspeed"):
        why = "the engine is always DeepSpeed's; the flags say what its JSON needs"
        found.add(theirs, "nothing", why)
        return
    setting = SETTINGS.get(name.replace("-", "_"))
    if setting is not None and setting.name in ("step_batch_size_schedule", "split", "pipeline_layout"):
        values = [" ".join(values)]
    said = parse_flags([flag, *values], parser)
    if said.problems:
        found.add(theirs, "REFUSED", "; ".join(said.problems))
    elif name in NO_EFFECT:
        found.add(theirs, "nothing", NO_EFFECT[name].why)
    for field_name, given in said.given.items():
        unknown = [value for value in values if PLACEHOLDER in value or _NAME.fullmatch(value)]
        is_text = str in SETTINGS[field_name].types or SETTINGS[field_name].is_list
        if unknown and not SETTINGS[field_name].choices and not is_text:
            found.add(theirs, "REFUSED", f"only a run of the script knows the value; give {SETTINGS[field_name].flag}")
        else:
            fate: Fate = "same" if field_name == name.replace("-", "_") else "renamed"
            found.give(theirs, field_name, given.value, "fill in" if unknown and is_text else fate)


def _defaults(found: Translation) -> None:
    """Megatron's defaults where they are others than megalm's and change the training."""
    given = found.given
    for name in ("attention_dropout", "hidden_dropout"):
        if name not in given:
            found.give(f"(--{name.replace('_', '-')} 0.1)", name, 0.1, "written")
    if given.get("model_family") == "bert":
        found.give("(token types)", "num_tokentypes", 0 if given.get("bert_no_binary_head") else 2, "written")
    if given.get("swiglu") and "ffn_hidden_size" not in given and "hidden_size" in given:
        size = int(4 * given["hidden_size"] * 2 / 3 / 64) * 64  # Megatron rounds down, megalm up
        found.give(f"(--ffn-hidden-size {size})", "ffn_hidden_size", size, "written")
    if "tokenizer_type" not in given and "vocab_file" in given and "merge_file" in given:
        found.give("(--tokenizer-type GPT2BPETokenizer)", "tokenizer_type", "GPT2BPETokenizer", "written")
