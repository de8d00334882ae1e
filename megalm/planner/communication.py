"""Bytes that one rank sends in a step, by axis of the mesh; collectives as rings (Thakur et al. 2005).

Shapes: B micro-batch, T sequence, D model width.
"""

import math
from itertools import pairwise
from typing import NamedTuple

from megalm.config.deepspeed.write import engine_json, zero_stage
from megalm.config.generator import generator_of
from megalm.config.spans import decoder_seq_length
from megalm.parallel.recompute import FullRecompute
from megalm.planner.layout import Layout
from megalm.planner.memory import MAX_LIVE, SIZES


def sent_bytes(layout: Layout, parameters: int) -> dict[str, int]:
    """Bytes a step by axis, of the rank that sends most; `parameters` are those of one rank."""
    return {
        "dp": _data_parallel(layout, parameters),
        "tp": _tensor_parallel(layout),
        "pp": _pipeline(layout),
    }


def _data_parallel(layout: Layout, parameters: int) -> int:
    """Gradients are reduced, at stages 2 and 3 after every micro-batch, and weights gathered.

    Stages 0 to 2 all-reduce gradients: DeepSpeed does so with the buckets of stages 1 and 2, of which a rank then keeps
    its part. Stage 3 scatters the sum.
    """
    ranks, stage, weight = layout.mesh.dp, zero_stage(layout.config), SIZES[layout.config.precision.dtype]
    # a table that both ends of a pipeline hold waits for the end of the step
    reduced = layout.micro_batches * (parameters - _copied(layout)) + _copied(layout) if stage > 1 else parameters
    gathered = (0, 1, 1, layout.micro_batches * _gathers(layout, parameters))[stage] * parameters
    sent = (1 if stage == 3 else 2) * reduced * _gradient_bytes(layout) + gathered * weight
    return int((ranks - 1) / ranks * sent)


def _gathers(layout: Layout, parameters: int) -> int:
    """How often stage 3 gathers a weight for one micro-batch.

    Once, where it may hold all of them at a time; else for each pass. In pipelines each stage lets go after each pass.
    """
    config = layout.config
    zero = engine_json(config, layout.mesh.dp)["zero_optimization"]
    if layout.mesh.pp == 1 and parameters <= int(zero.get("stage3_max_live_parameters", MAX_LIVE)):
        return 1
    return 3 if config.recompute.recompute_granularity == "full" else 2


def _tensor_parallel(layout: Layout) -> int:
    """Two all-reduces a layer forward and two backward; one for the embedding's output, one for the head's input.

    Cross-attention adds one forward and one backward, and one backward of the encoder's output.
    With sequence parallelism a reduce-scatter and an all-gather take the place of each, of the same volume together,
    and what enters the region is gathered once more in the backward pass.
    Sources: Shoeybi et al. 2019, arXiv:1909.08053, section 3; Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
    """
    ranks = layout.mesh.tp
    all_reduce = 2 * (ranks - 1) / ranks * _activation_bytes(layout)
    most = max(
        all_reduce * _all_reduces(layout, rank) + _summed_gradients(layout, rank) for rank in range(layout.mesh.pp)
    )
    return int(layout.micro_batches * most)


def _summed_gradients(layout: Layout, pp_rank: int) -> float:
    """Bytes for the gradients of norms and of key/value heads that several ranks hold, all-reduced in float32."""
    return sum(2 * (ranks - 1) / ranks * 4 * elements for elements, ranks in layout.summed_gradients(pp_rank))


def _all_reduces(layout: Layout, pp_rank: int) -> float:
    """Number of all-reduces on a pipeline rank for one micro-batch.

    Full recomputation runs a group of layers forward once more, up to the last activation that the backward pass reads:
    not to the reduction (or reduce-scatter, half of one) at the group's end. With sequence parallelism the inputs of
    attention, MLP and head are gathered again in the backward pass, each half an all-reduce.
    """
    config, number = layout.config.recompute, 0.0
    last, again = (0.5, 0.5) if layout.config.parallel.sequence_parallel else (1.0, 0.0)
    written = _decoder_share(layout)
    for stage in layout.pipeline.stages(pp_rank):
        layers = [_reduces_of_layer(layout, number) for number in layout.pipeline.layers[stage]]
        head = written * (stage == len(layout.pipeline.layers) - 1)
        number += sum(layer.reduced + again * layer.inputs for layer in layers) + head + again * head
        if stage == 0:
            model = layout.config.model
            number += 1 + (written if model.encoder_decoder or model.generator_layers else 0)
        if config.recompute_granularity == "full":
            groups = FullRecompute(config, len(layers), draws=False).groups
            number += sum(
                sum(layer.branches for layer in layers[group]) - last * layers[group][-1].stream for group in groups
            )
    return number


class _Reduces(NamedTuple):
    """What a layer all-reduces of one micro-batch, in activations of `seq_length` tokens."""

    reduced: float
    """In both passes."""
    inputs: float
    """What enters the tensor-parallel region."""
    branches: float
    """What leaves it in the forward pass."""
    stream: float
    """The residual stream."""


def _reduces_of_layer(layout: Layout, number: int) -> _Reduces:
    model = layout.config.model
    if number < model.generator_layers:
        share = generator_of(model).hidden_size / model.hidden_size
        return _Reduces(reduced=4 * share, inputs=2 * share, branches=2 * share, stream=share)
    if number < model.num_layers + model.generator_layers:
        # the gradient of what attention reads, which the memory of segment recurrence is part of
        memory = (model.segment_memory or 0) / layout.config.batch.seq_length
        return _Reduces(reduced=4 + memory, inputs=2 + memory, branches=2, stream=1)
    own = _decoder_share(layout)
    return _Reduces(reduced=6 * own + 1, inputs=3 * own + 1, branches=3 * own, stream=own)


def _decoder_share(layout: Layout) -> float:
    """The length of what the head reads, in those of `seq_length`."""
    return (decoder_seq_length(layout.config) or layout.config.batch.seq_length) / layout.config.batch.seq_length


def _pipeline(layout: Layout) -> int:
    """The stream forward and its gradient backward, at every border between stages of different ranks; with sequence
    parallelism a rank has its part of it.

    Where the first and the last stage hold a table each, its gradient is all-reduced between the two, in float32 but
    where gradients are accumulated in the model's own type.
    """
    ranks = layout.stage_ranks
    sent = [0] * layout.mesh.pp
    for left, right in pairwise(ranks):
        if left != right:
            sent[left] += 1
            sent[right] += 1
    sent = [layout.micro_batches * borders * _stream_bytes(layout) for borders in sent]
    for rank in layout.pipeline.ends:
        sent[rank] += _copied(layout) * _gradient_bytes(layout)
    return max(sent)


def _copied(layout: Layout) -> int:
    """Elements on one rank of what both ends of a pipeline hold: tied embeddings."""
    if not layout.pipeline.copied:
        return 0
    held = dict(layout.stages(0)[0].part.named_parameters())
    return sum(held[name].numel() for name in layout.pipeline.copied)


def _gradient_bytes(layout: Layout) -> int:
    """Bytes of one element of accumulated gradients."""
    precision = layout.config.precision
    return 4 if precision.grad_accum_dtype == "fp32" else SIZES[precision.dtype]


def _stream_bytes(layout: Layout) -> int:
    """All that a rank sends of one micro-batch to the next stage."""
    batch = layout.config.batch
    parts = layout.mesh.tp if layout.config.parallel.sequence_parallel else 1
    shapes = layout.stages(0)[0].part.stream_shapes(batch.micro_size, batch.seq_length, parts)
    return sum(map(math.prod, shapes)) * SIZES[layout.config.precision.dtype]


def _activation_bytes(layout: Layout) -> int:
    """The residual stream (B, T, D) of one micro-batch."""
    batch, config = layout.config.batch, layout.config
    return batch.micro_size * batch.seq_length * config.model.hidden_size * SIZES[config.precision.dtype]
