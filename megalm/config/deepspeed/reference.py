"""The keys of a DeepSpeed JSON and what megalm does about each, as the rows of a Markdown table."""

import json
from collections.abc import Iterator

from megalm.config.deepspeed.answers import HANDED, NO_EFFECT_JSON, REMOVED, UNSUPPORTED_JSON, Handed
from megalm.config.deepspeed.read import FACTS

ABOUT = """A key is the same as a setting, goes to DeepSpeed, has no effect (and the log says so), or is refused with
file, line and reason. A refused key is accepted where it asks for nothing: `false`, `null`, "auto", an empty or
disabled block, or a value named here. What goes to DeepSpeed is left out at ZeRO stages that do not read it; every such
key is tested at every stage, with and without a pipeline: a run trains, saves and goes on with it, and one process
without it evaluates the checkpoint to the same loss."""


def rows() -> Iterator[tuple[str, str]]:
    """(key, what megalm does), sorted by key."""
    found = {fact.path: f"`--{fact.name.replace('_', '-')}`" for fact in FACTS}
    found["optimizer.params.betas"] = "`--adam-beta1`, `--adam-beta2`, or those of Lion"
    found["tensorboard"] = "`--tensorboard-dir`: output_path/job_name"
    found |= {key: f"no effect: {why}" for key, why in NO_EFFECT_JSON.items()}
    found |= {key: _refused(why, accepted) for key, (why, accepted) in UNSUPPORTED_JSON.items()}
    found |= {key: f"refused, removed from DeepSpeed: {why}" for key, why in REMOVED.items()}
    found |= {key: _handed(handed) for key, handed in HANDED.items()}
    yield from sorted(found.items())


def _refused(why: str, accepted: tuple[object, ...]) -> str:
    values = f" (accepted: {', '.join(map(json.dumps, accepted))})" if accepted else ""
    return f"refused: {why}{values}"


def _handed(handed: Handed) -> str:
    stages = ", ".join(map(str, handed.stages))
    text = f"DeepSpeed's, at ZeRO {stages}"
    text += f"; {' or '.join(map(json.dumps, handed.choices))}" if handed.choices else ""
    text += f"; at least {handed.least:g}" if handed.least is not None else ""
    text += f", at most {handed.most:g}" if handed.most is not None else ""
    for refusal in handed.refusals:
        values = f" {' or '.join(map(json.dumps, refusal.values))}" if refusal.values else ""
        where = f" at ZeRO {', '.join(map(str, refusal.stages))}" if len(refusal.stages) < 4 else ""
        text += f"; refused{values}{where}{' with a pipeline' if refusal.pipeline else ''}: {refusal.why}"
    return text
