"""A DeepSpeed JSON in, the facts that megalm knows under another name out; unknown and refused keys are problems.

"auto", at any depth, is the same as leaving the key out.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megalm.config.deepspeed.vocabulary import REMOVED, UNSUPPORTED_JSON, VOCABULARY
from megalm.config.merging.settings import Given
from megalm.config.merging.suggest import did_you_mean
from megalm.shipped import shipped_hint
from megalm.storage.documents import DocumentError, parse_json, read_settings
from megalm.storage.faults import reason_of

KeyPath = tuple[str, ...]


@dataclass
class DeepSpeedJson:
    """The content of a DeepSpeed JSON, and the line of each of its keys in file `name`."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def source_of(self, path: KeyPath) -> str:
        """FILE:LINE of a key."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name

    def get(self, path: KeyPath) -> Any:
        """The value at a path; None where it is absent or "auto"."""
        value: Any = self.data
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return None if value == "auto" else value


def read_deepspeed_json(path: str) -> DeepSpeedJson:
    """The content of a file; syntax errors, repeated keys and NaN are problems."""
    document = DeepSpeedJson(path)
    try:
        content = read_settings(path)
        data = parse_json(content, repeats=True)
        text = content.decode()
    except OSError as error:
        document.problems.append(
            f"deepspeed_config={path} cannot be read: {reason_of(error, path)}{shipped_hint(path)}"
        )
        return document
    except DocumentError as error:
        source = f"{path}:{error.line}:{error.column}" if error.line else path
        document.problems.append(f"{source}: {error}")
        return document
    if not isinstance(data, dict):
        document.problems.append(f"{path}: a DeepSpeed configuration is a JSON object {{...}}")
        return document
    for keys, line in key_lines(text):
        if keys in document.lines:
            first = document.lines[keys]
            document.problems.append(f'{path}:{line}: "{".".join(keys)}" stands twice, first on line {first}; keep one')
        document.lines.setdefault(keys, line)
    document.data = data
    return document


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]')


def key_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    """Path and line of every key of a valid JSON text, in its order; an item of a list is [number of its token]."""
    above: list[str] = []
    line, key, word = 1, None, ""
    for number, token in enumerate(_TOKEN.findall(text)):
        if token == "\n":
            line += 1
        elif token[0] == '"':
            word = token
        elif token == ":":
            key = str(json.loads(word))
            yield (*above[1:], key), line
        elif token in "{[":
            above.append(key if key is not None else f"[{number}]")
            key = None
        elif token in "}]":
            above.pop()
        elif token == ",":
            key = None


def check_json(document: DeepSpeedJson) -> None:
    """Note every key that DeepSpeed does not know or no longer has, that megalm does not take, or whose value has the
    wrong type, and take it out of the content."""
    found = [*_check_block(document.data, VOCABULARY, ()), *_check_optimizer(document)]
    document.problems += [f"{document.source_of(path)}: {text}" for path, text in found]
    document.data = _without(document.data, {path for path, _ in found}, ())


def _check_block(block: dict[str, Any], known: dict[str, Any], above: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    for key, value in block.items():
        path = (*above, key)
        name = ".".join(path)
        if name in REMOVED:
            yield path, f'"{name}" was removed from DeepSpeed; {REMOVED[name]}'
        elif key not in known:
            yield path, _unknown_key(key, known, above)
        elif name in UNSUPPORTED_JSON and not _asks_for_nothing(value, UNSUPPORTED_JSON[name][1]):
            yield path, f'"{name}" is known in DeepSpeed but not supported here; {UNSUPPORTED_JSON[name][0]}'
        elif isinstance(known[key], dict) and isinstance(value, dict):
            yield from _check_block(value, known[key], path)
        elif value not in ("auto", None) and not _fits(value, known[key]):
            yield path, f"{name}={json.dumps(value)} must be {_KIND_NAMES[_kind(known[key])]}"


def _unknown_key(key: str, known: dict[str, Any], above: KeyPath) -> str:
    where = f' in "{".".join(above)}"' if above else ""
    elsewhere = [name for name, block in VOCABULARY.items() if isinstance(block, dict) and key in block]
    if above and key in VOCABULARY:
        hint = "; it belongs at the top level"
    elif elsewhere:
        hint = f'; it belongs in "{elsewhere[0]}"'
    else:
        hint = did_you_mean(key, known) or did_you_mean(key, VOCABULARY)
    return f'DeepSpeed knows no key "{key}"{where}{hint}'


def _asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    if isinstance(value, dict) and "enabled" in value:
        return value["enabled"] in (False, "auto")
    return value is None or value == "auto" or value in harmless or (value is False and True not in harmless)


_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number, not negative",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a block {...}",
}


def _kind(known: Any) -> type:
    return dict if isinstance(known, dict) else known


def _fits(value: Any, known: Any) -> bool:
    kind = _kind(known)
    if kind is int:
        return not isinstance(value, bool) and isinstance(value, int | float) and value >= 0 and value == int(value)
    if kind is float:
        return not isinstance(value, bool) and isinstance(value, int | float)
    return isinstance(value, kind)


@dataclass(frozen=True)
class Fact:
    """A JSON key that says what a megalm setting says."""

    path: str
    name: str
    convert: Callable[[Any], Any] = lambda value: value


OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lion": "lion", "muon": "muon"}
"""DeepSpeed's optimizers (in lower case) that megalm has: its own names."""

FACTS = (
    Fact("train_batch_size", "global_batch_size"),
    Fact("train_micro_batch_size_per_gpu", "micro_batch_size"),
    Fact("gradient_accumulation_steps", "gradient_accumulation_steps"),
    Fact("gradient_clipping", "clip_grad"),
    Fact("zero_optimization.stage", "zero_stage"),
    Fact("bf16.enabled", "bf16"),
    Fact("fp16.enabled", "fp16"),
    Fact("fp16.loss_scale", "loss_scale", lambda scale: scale or None),
    Fact("fp16.initial_scale_power", "initial_loss_scale", lambda power: 2.0 ** min(int(power), 1000)),
    Fact("fp16.loss_scale_window", "loss_scale_window"),
    Fact("fp16.hysteresis", "hysteresis"),
    Fact("fp16.min_loss_scale", "min_loss_scale"),
    Fact("data_types.grad_accum_dtype", "grad_accum_dtype", lambda name: "fp32" if name == "fp32" else "model"),
    Fact("optimizer.type", "optimizer", lambda kind: OPTIMIZERS[kind.lower()]),
    Fact("optimizer.params.lr", "lr"),
    Fact("optimizer.params.momentum", "muon_momentum"),
    Fact("optimizer.params.eps", "adam_eps"),
    Fact("optimizer.params.weight_decay", "weight_decay"),
)


def facts(document: DeepSpeedJson) -> Iterator[tuple[str, Given, str]]:
    """(field, value, "path=value" as the JSON says it) for each fact that a checked JSON states."""
    fp16_off = document.get(("fp16", "enabled")) is False
    for fact in FACTS:
        path = tuple(fact.path.split("."))
        value = document.get(path)
        unused = fp16_off and path[0] == "fp16" and path[1] != "enabled"
        if value is not None and not unused:
            shown = f"{fact.path}={json.dumps(value)}"
            yield fact.name, Given(fact.convert(value), document.source_of(path)), shown
    betas = document.get(("optimizer", "params", "betas"))
    if betas is not None:
        path = ("optimizer", "params", "betas")
        kind = "lion" if str(document.get(("optimizer", "type"))).lower() == "lion" else "adam"
        for number, name in enumerate((f"{kind}_beta1", f"{kind}_beta2")):
            yield name, Given(betas[number], document.source_of(path)), f"optimizer.params.betas={json.dumps(betas)}"


def _check_optimizer(document: DeepSpeedJson) -> Iterator[tuple[KeyPath, str]]:
    kind = document.get(("optimizer", "type"))
    if isinstance(kind, str) and kind.lower() not in OPTIMIZERS:
        yield ("optimizer", "type"), f'optimizer.type="{kind}" is not supported here; use "AdamW", "Lion" or "Muon"'
    betas = document.get(("optimizer", "params", "betas"))
    if isinstance(betas, list) and (len(betas) != 2 or any(not _fits(beta, float) for beta in betas)):
        text = f"optimizer.params.betas={json.dumps(betas)} must be two numbers, as [0.9, 0.95]"
        yield ("optimizer", "params", "betas"), text


def remainder(document: DeepSpeedJson) -> dict[str, Any]:
    """What only DeepSpeed knows: the content without facts, "auto" values, the optimizer, and blocks left empty."""
    known = {tuple(fact.path.split(".")) for fact in FACTS} | {("optimizer",)}
    return _without(document.data, known, ())


def _without(block: dict[str, Any], known: set[KeyPath], above: KeyPath) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in block.items():
        path = (*above, key)
        if path in known or value == "auto" or value is None:
            continue
        if isinstance(value, dict):
            value = _without(value, known, path)
            if not value:
                continue
        kept[key] = value
    return kept
