"""Bytes that one rank sends in a step, by axis of the mesh; collectives as rings (Thakur et al. 2005).

Shapes: B micro-batch, T sequence, D model width.
"""

from itertools import pairwise

from megalm.config import zero_stage
from megalm.planner.layout import Layout
from megalm.planner.memory import SIZES


def sent_bytes(layout: Layout, parameters: int) -> dict[str, int]:
    """Bytes a step by axis, of the rank that sends most; `parameters` are those of one rank."""
    return {
        "dp": _data_parallel(layout, parameters),
        "tp": _tensor_parallel(layout),
        "pp": _pipeline(layout),
    }


def _data_parallel(layout: Layout, parameters: int) -> int:
    """Gradients are reduced, weights gathered: all-reduce (0), reduce-scatter and gather (1, 2), by micro-batch (3)."""
    ranks, precision, stage = layout.mesh.dp, layout.config.precision, zero_stage(layout.config)
    weight = SIZES[precision.dtype]
    gradient = _gradient_bytes(layout)
    once = (ranks - 1) / ranks * parameters
    if stage == 0:
        return int(2 * once * gradient)
    if stage < 3:
        reductions = layout.micro_batches if stage == 2 else 1
        return int(once * (reductions * gradient + weight))
    gathers = 3 if layout.config.recompute.recompute_granularity == "full" else 2
    return int(layout.micro_batches * once * (gathers * weight + gradient))


def _tensor_parallel(layout: Layout) -> int:
    """Two all-reduces a layer forward and two backward; one for the embedding's output, one for the head's input.

    With sequence parallelism a reduce-scatter and an all-gather take the place of each, of the same volume together.
    Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    ranks, config = layout.mesh.tp, layout.config
    all_reduce = 2 * (ranks - 1) / ranks * _activation_bytes(layout)
    passes = 3 if config.recompute.recompute_granularity == "full" else 2
    most = max(len(layout.layers(rank)) for rank in range(layout.mesh.pp))
    return int(layout.micro_batches * all_reduce * (2 * passes * most + 2))


def _pipeline(layout: Layout) -> int:
    """The residual stream forward and its gradient backward, at every border between stages of different ranks.

    Where the first and the last stage hold a table each, its gradient is all-reduced between the two, in float32 but
    where gradients are accumulated in the model's own type.
    """
    ranks = layout.stage_ranks
    sent = [0] * layout.mesh.pp
    for left, right in pairwise(ranks):
        if left != right:
            sent[left] += 1
            sent[right] += 1
    sent = [layout.micro_batches * borders * _activation_bytes(layout) for borders in sent]
    if layout.pipeline.has_copy(layout.config.model):
        table = layout.rows * layout.config.model.hidden_size * _gradient_bytes(layout)
        for rank in layout.pipeline.ends:
            sent[rank] += table
    return max(sent)


def _gradient_bytes(layout: Layout) -> int:
    """Bytes of one element of accumulated gradients."""
    precision = layout.config.precision
    return 4 if precision.grad_accum_dtype == "fp32" else SIZES[precision.dtype]


def _activation_bytes(layout: Layout) -> int:
    """The residual stream (B, T, D) of one micro-batch."""
    batch, config = layout.config.batch, layout.config
    return batch.micro_size * batch.seq_length * config.model.hidden_size * SIZES[config.precision.dtype]
