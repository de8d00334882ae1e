"""How a run computes the loss of its tokens, from its settings alone: every rank and the planner choose alike."""

from typing import Literal

from megalm.config.sections import RunConfig
from megalm.config.spans import decoder_seq_length

LOGITS_LIMIT = 2 * 2**30
"""Bytes of logits of one micro-batch on a rank that --cross-entropy-fusion-impl auto holds at most."""


def logits_bytes(config: RunConfig) -> int:
    """Logits of one micro-batch, padding included, on a rank that holds the output head; its vocabulary is known."""
    tp, batch = config.parallel.tensor_model_parallel_size, config.batch
    columns = config.model.padded_vocab_size(tp) // tp
    length = decoder_seq_length(config) or batch.seq_length
    return batch.micro_size * length * columns * (4 if config.precision.dtype == "fp32" else 2)


def cross_entropy_impl(config: RunConfig) -> Literal["logits", "linear"]:
    """What --cross-entropy-fusion-impl says; of auto, linear where the logits would take more than `LOGITS_LIMIT`.

    Capped logits are held, and those that are compared with a teacher's.
    """
    chosen = config.kernels.cross_entropy_fusion_impl
    is_held = config.model.final_logit_softcapping is not None or config.distillation.teacher_load is not None
    if chosen == "auto" and is_held:
        return "logits"
    if chosen == "auto":
        return "linear" if logits_bytes(config) > LOGITS_LIMIT else "logits"
    return chosen
