"""Names of metrics: the keys of rows, and Megatron-LM's tags for them.

A row is a dict with `step`, `consumed_samples` and any of these keys. "loss" is the loss that is trained on, and
"loss/NAME" that of one dataset of a blend; further named losses of an objective are "NAME_loss". An evaluation of the
set SET has "validation_loss", "validation_ppl", "validation_loss/SET" and so on.
"""

import re
from collections.abc import Mapping
from typing import Any

TAGS = {
    "loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "global_batch_size": "batch-size",
    "loss_scale": "loss-scale",
    "iteration_time_s": "iteration-time",
    "params_norm": "params-norm",
    "decoupled_learning_rate": "decoupled-learning-rate",
    "weight_decay": "weight-decay",
    "tokens_per_s": "throughput/tokens-per-s",
    "tflops_per_rank": "throughput/model-tflops-per-rank",
    "data_wait_s": "data/wait-s",
    "memory_bytes": "mem-max-allocated-bytes",
    "validation_loss": "lm loss validation",
    "validation_ppl": "lm loss validation ppl",
    "lm_loss": "lm-only loss",
    "validation_lm_loss": "lm-only loss validation",
}
"""Key of a row -> tag. That of tokens, where it is one loss of several, is apart from the whole."""
_OVER_SAMPLES = {
    *("loss", "learning_rate", "grad_norm", "global_batch_size", "loss_scale"),
    *("validation_loss", "validation_ppl", "lm_loss", "validation_lm_loss"),
}
_NAMED_LOSS = re.compile(r"(validation_)?(\w+)_loss")
DATA = "data"
"""data/NAME is what an objective makes of its samples: its tag is the same with dashes, data/mask-rate."""
NOT_A_NAMED_LOSS = {"validation_loss", "test_loss"}


def named_losses(losses: Mapping[str, float], prefix: str = "", suffix: str = "") -> dict[str, float]:
    """The losses by their keys in a row; none where the loss has one part only."""
    return {f"{prefix}{name}_loss{suffix}": loss for name, loss in losses.items()} if len(losses) > 1 else {}


def losses_of(row: Mapping[str, Any], prefix: str = "", suffix: str = "") -> dict[str, float]:
    """What `named_losses` has put into a row."""
    key = re.compile(rf"{prefix}(\w+)_loss{re.escape(suffix)}")
    matches = {name: key.fullmatch(name) for name in row if name not in NOT_A_NAMED_LOSS}
    return {match[1]: row[name] for name, match in matches.items() if match}


def tag_of(key: str) -> str | None:
    """The tag of a key of a row; None for what is not shown as a curve."""
    name, _, part = key.partition("/")
    if name == DATA:
        return key.replace("_", "-")
    tag = TAGS.get(name)
    if tag is None and name not in NOT_A_NAMED_LOSS and (match := _NAMED_LOSS.fullmatch(name)):
        tag = f"{match[2]} loss" + (" validation" if match[1] else "")
    return tag if tag is None or not part else f"{tag} {part}"


def is_over_samples(key: str) -> bool:
    """Whether the curve has a twin over consumed samples."""
    name = key.partition("/")[0]
    return name in _OVER_SAMPLES or (name not in {*TAGS, DATA} and tag_of(key) is not None)
