"""A DeepSpeed JSON in, the facts that megalm knows under another name out, and what only DeepSpeed knows.

"auto", at any depth, is the same as leaving the key out.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.merging.settings import Given
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
    notes: list[str] = field(default_factory=list)
    """What is accepted and changes nothing."""

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


@dataclass(frozen=True)
class Fact:
    """A JSON key that says what a megalm setting says."""

    path: str
    name: str
    convert: Callable[[Any], Any] = lambda value: value


OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lion": "lion", "muon": "muon"}
"""DeepSpeed's optimizers (in lower case) that megalm has: its own names."""
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedulers that megalm has: the decay after the warmup."""

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
    Fact("scheduler.type", "lr_decay_style", lambda kind: SCHEDULERS[kind]),
    Fact("scheduler.params.warmup_max_lr", "lr"),
    Fact("scheduler.params.warmup_min_lr", "lr_warmup_init"),
    Fact("scheduler.params.warmup_num_steps", "lr_warmup_iters"),
    Fact("scheduler.params.total_num_steps", "lr_decay_iters"),
    Fact("tensor_parallel.autotp_size", "tensor_model_parallel_size", lambda size: size or 1),
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
    yield from _tensorboard(document)
    betas = document.get(("optimizer", "params", "betas"))
    if betas is not None:
        path = ("optimizer", "params", "betas")
        kind = "lion" if str(document.get(("optimizer", "type"))).lower() == "lion" else "adam"
        for number, name in enumerate((f"{kind}_beta1", f"{kind}_beta2")):
            yield name, Given(betas[number], document.source_of(path)), f"optimizer.params.betas={json.dumps(betas)}"


def _tensorboard(document: DeepSpeedJson) -> Iterator[tuple[str, Given, str]]:
    """The folder of the event files, as DeepSpeed puts it together."""
    folder, job = (document.get(("tensorboard", key)) for key in ("output_path", "job_name"))
    if document.get(("tensorboard", "enabled")) and folder:
        path = ("tensorboard", "output_path")
        value = str(Path(folder, job or "DeepSpeedJobName"))
        yield "tensorboard_dir", Given(value, document.source_of(path)), f"tensorboard.output_path={json.dumps(folder)}"


def remainder(document: DeepSpeedJson) -> dict[str, Any]:
    """What only DeepSpeed knows: the content without facts, "auto" values, the optimizer, and blocks left empty."""
    blocks = {("optimizer",), ("scheduler",), ("tensor_parallel",), ("tensorboard",)}
    known = {tuple(fact.path.split(".")) for fact in FACTS} | blocks
    return without(document.data, known)


def without(block: dict[str, Any], known: set[KeyPath], above: KeyPath = ()) -> dict[str, Any]:
    """The content without `known` keys, "auto" values, and blocks left empty."""
    kept: dict[str, Any] = {}
    for key, value in block.items():
        path = (*above, key)
        if path in known or value == "auto" or value is None:
            continue
        if isinstance(value, dict):
            value = without(value, known, path)
            if not value:
                continue
        kept[key] = value
    return kept
