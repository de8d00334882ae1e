"""What a DeepSpeed JSON asks for that megalm cannot do becomes problems, and what changes nothing becomes notes."""

import json
from collections.abc import Iterator
from typing import Any

from megalm.config.deepspeed.answers import HANDED, NO_EFFECT_JSON, REMOVED, UNSUPPORTED_JSON, Handed
from megalm.config.deepspeed.read import OPTIMIZERS, SCHEDULERS, DeepSpeedJson, KeyPath, without
from megalm.config.deepspeed.vocabulary import VOCABULARY
from megalm.config.merging.suggest import did_you_mean

Finding = tuple[KeyPath, str]


def check_json(document: DeepSpeedJson) -> None:
    """Note every key that DeepSpeed does not know or no longer has, that megalm does not take, or whose value has the
    wrong type, and take it out of the content; so are keys that change nothing.
    """
    _modernize(document)
    idle: list[Finding] = []
    found = [*_check_named(document)]
    skipped = {(*path[:-1], "params") for path, _ in found if path[-1] == "type"}
    found += _check_block(document.data, VOCABULARY, (), idle, skipped)
    document.problems += [f"{document.source_of(path)}: {text}" for path, text in found]
    document.notes += [f"{document.source_of(path)}: {text}" for path, text in idle if text]
    document.data = without(document.data, {path for path, _ in [*found, *idle]} | skipped)


def check_engine_keys(document: DeepSpeedJson, zero_stage: int, *, pipeline: bool) -> None:
    """The same for what DeepSpeed would get, by where the run would use it."""
    gone: set[KeyPath] = set()
    for name, handed in HANDED.items():
        path = tuple(name.split("."))
        value = document.get(path)
        if value is None:
            continue
        problem = _refusal(name, value, handed, zero_stage, pipeline)
        if problem is not None:
            document.problems.append(f"{document.source_of(path)}: {problem}")
            gone.add(path)
        elif zero_stage not in handed.stages and path[-1] != "device":  # offload has a rule of its own
            if value is not False:
                document.notes.append(f'{document.source_of(path)}: "{name}" has no effect at ZeRO stage {zero_stage}')
            gone.add(path)
    document.data = without(document.data, gone)


def _refusal(name: str, value: Any, handed: Handed, zero_stage: int, pipeline: bool) -> str | None:
    given = f"{name}={json.dumps(value)}"
    if handed.choices and value not in handed.choices:
        return f"{given} must be one of {', '.join(map(json.dumps, handed.choices))}"
    if handed.least is not None and value < handed.least:
        return f"{given} must be at least {handed.least:g}"
    if handed.most is not None and value > handed.most:
        return f"{given} must be at most {handed.most:g}"
    why = next((rule.why for rule in handed.refusals if rule.concerns(value, zero_stage, pipeline)), None)
    return None if why is None else f"{given} is not supported at ZeRO stage {zero_stage}: {why}"


_MODERN = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
}


def _modernize(document: DeepSpeedJson) -> None:
    """Keys that DeepSpeed has renamed, by their present names."""
    data = document.data
    if isinstance(data.get("bfloat16"), dict) and "bf16" not in data:
        data["bf16"] = data.pop("bfloat16")
        document.lines |= {("bf16", *path[1:]): line for path, line in document.lines.items() if path[0] == "bfloat16"}
    zero = data.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    pins = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in _MODERN.items():
        if isinstance(zero.get(old), bool) and zero.pop(old) and new not in zero:
            zero[new] = {"device": "cpu"} | ({"pin_memory": True} if pins is True else {})
            line = document.lines.get(("zero_optimization", old))
            if line is not None:
                document.lines |= {("zero_optimization", new): line, ("zero_optimization", new, "device"): line}


def _check_block(
    block: dict[str, Any], known: dict[str, Any], above: KeyPath, idle: list[Finding], skipped: set[KeyPath]
) -> Iterator[Finding]:
    for key, value in block.items():
        path = (*above, key)
        name = ".".join(path)
        if path in skipped:
            continue
        harmless = UNSUPPORTED_JSON[name][1] if name in UNSUPPORTED_JSON else ()
        refused = name in REMOVED or name in UNSUPPORTED_JSON
        if refused and asks_for_nothing(value, harmless):
            idle.append((path, ""))
        elif name in REMOVED:
            yield path, f'"{name}" was removed from DeepSpeed; {REMOVED[name]}'
        elif key not in known:
            yield path, _unknown_key(key, known, above)
        elif name in UNSUPPORTED_JSON:
            yield path, f'"{name}" is known in DeepSpeed but not supported here; {UNSUPPORTED_JSON[name][0]}'
        elif value not in ("auto", None) and not _fits(value, known[key]):
            yield path, f"{name}={json.dumps(value)} must be {_KIND_NAMES[_kind(known[key])]}"
        elif name in NO_EFFECT_JSON:
            idle.append((path, "" if asks_for_nothing(value) else f'"{name}" has no effect: {NO_EFFECT_JSON[name]}'))
        elif isinstance(known[key], dict) and isinstance(value, dict):
            if value.get("enabled", True) is False and name not in ("bf16", "fp16"):
                idle.append((path, ""))
            else:
                yield from _check_block(value, known[key], path, idle, skipped)


def _unknown_key(key: str, known: dict[str, Any], above: KeyPath) -> str:
    if above == ("optimizer", "params") and key in _OTHERS_PARAMETERS:
        return f'"{key}" is a setting of {_OTHERS_PARAMETERS[key]} and none of AdamW, Lion and Muon; remove it'
    where = f' in "{".".join(above)}"' if above else ""
    elsewhere = [name for name, block in VOCABULARY.items() if isinstance(block, dict) and key in block]
    if above and key in VOCABULARY:
        hint = "; it belongs at the top level"
    elif elsewhere:
        hint = f'; it belongs in "{elsewhere[0]}"'
    else:
        hint = did_you_mean(key, known) or did_you_mean(key, VOCABULARY)
    return f'DeepSpeed knows no key "{key}"{where}{hint}'


_SWITCHES = ("enabled", "deepcompile")


def asks_for_nothing(value: Any, harmless: tuple[Any, ...] = ()) -> bool:
    """Whether a value of a key that megalm does not take leaves everything as it is: off, empty, or a default.

    A block asks for nothing when its switch is off, or when all its parts ask for nothing.
    """
    if value is None or value == "auto" or any(value is one or value == one for one in harmless):
        return True
    if not isinstance(value, dict):
        return not value and True not in harmless
    shared = value.get("shared_parameters")  # where compression_training has its switches
    if isinstance(shared, dict) and asks_for_nothing({"enabled": shared.get("enabled", False)}):
        return True
    switches = [value[name] for name in _SWITCHES if name in value]
    if switches and switches[0] in (False, None, "auto"):
        return True
    parts = [part for part in value.values() if isinstance(part, dict)] if switches else list(value.values())
    return bool(parts or not value) and all(asks_for_nothing(part) for part in parts)


_LARGEST = 2**63
"""What a number of DeepSpeed's has to be below."""
_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number, not negative, below 2^63",
    float: "a number, not as large as 2^63",
    str: "text",
    list: "a list",
    dict: "a block {...}",
}


def _kind(known: Any) -> type:
    return dict if isinstance(known, dict) else known


def _fits(value: Any, known: Any) -> bool:
    kind = _kind(known)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:  # 1e400 is inf
            return False
        return kind is float or (value >= 0 and value == int(value))
    return isinstance(value, kind)


_OTHERS_PARAMETERS = {
    **dict.fromkeys(("freeze_step", "cuda_aware", "comm_backend_name"), "OneBitAdam and OneBitLamb"),
    **dict.fromkeys(("coeff_beta", "factor_max", "factor_min", "factor_threshold"), "OneBitLamb"),
    **dict.fromkeys(("max_coeff", "min_coeff"), "Lamb"),
    **dict.fromkeys(("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"), "ZeroOneAdam"),
    **dict.fromkeys(("nesterov", "dampening"), "SGD"),
    **dict.fromkeys(("maximize", "capturable", "differentiable", "eps_inside_sqrt"), "other implementations of Adam"),
}
"""Settings of optimizers that DeepSpeed has and megalm has not."""


def _check_named(document: DeepSpeedJson) -> Iterator[Finding]:
    """The optimizer and the scheduler, whose settings depend on their type."""
    kind = document.get(("optimizer", "type"))
    if isinstance(kind, str) and kind.lower() not in OPTIMIZERS:
        yield ("optimizer", "type"), f'optimizer.type="{kind}" is not supported here; use "AdamW", "Lion" or "Muon"'
    betas = document.get(("optimizer", "params", "betas"))
    if isinstance(betas, list) and (len(betas) != 2 or any(not _fits(beta, float) for beta in betas)):
        text = f"optimizer.params.betas={json.dumps(betas)} must be two numbers, as [0.9, 0.95]"
        yield ("optimizer", "params", "betas"), text
    yield from _check_scheduler(document)


def _check_scheduler(document: DeepSpeedJson) -> Iterator[Finding]:
    kind, above = document.get(("scheduler", "type")), ("scheduler", "params")
    if not isinstance(kind, str):
        return
    if kind not in SCHEDULERS:
        text = (
            f'"scheduler" of type "{kind}" is not supported here; use --lr-decay-style, --lr-decay-iters and '
            "--lr-warmup-iters"
        )
        yield ("scheduler", "type"), text
        return
    params = document.data["scheduler"].get("params")
    given = params if isinstance(params, dict) else {}
    if "warmup_num_steps" not in given:
        yield (
            ("scheduler", "type"),
            (f'scheduler.type="{kind}" without warmup_num_steps means 1000 steps to DeepSpeed; write it, or "auto"'),
        )
    elif document.get((*above, "warmup_num_steps")) and document.get((*above, "warmup_type")) != "linear":
        yield (
            (*above, "warmup_num_steps"),
            (
                'scheduler.params.warmup_num_steps without "warmup_type": "linear" is a logarithmic warmup, which '
                "megalm does not have; write it, or use --lr-warmup-iters"
            ),
        )
    elif document.get((*above, "warmup_num_steps")):
        # DeepSpeed's first two steps have the rate of step 0 (lr_schedules.WarmupLR), megalm's first that of step 1
        document.notes.append(
            f"{document.source_of(('scheduler', 'type'))}: megalm's step N has the learning rate of step N + 2 under "
            f"DeepSpeed's {kind}"
        )
