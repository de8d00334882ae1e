"""A step's micro-batches through all stages of a pipeline.

What travels between stages is the stream alone; tokens, labels, positions and document boundaries come to each stage
from the batch, which every pipeline rank loads. Shapes: B micro-batch size, T sequence, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.config.sections import RunConfig
from megalm.data.batch import Batch as TensorBatch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis
from megalm.models.contract import Batch, LanguageModel, Losses, OnLosses, Stream
from megalm.models.dtypes import DTYPES
from megalm.parallel.pipeline.partition import rank_of_stage
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.pipeline.schedules import build_schedule
from megalm.parallel.pipeline.stage import ModelStage, OnGradients, StageModule, StepInputs


class Gradients(Protocol):
    """Who takes the gradients of stages, for whatever optimizer there is."""

    def collected(self) -> AbstractContextManager[OnGradients]:
        """A step: yields what is to be called with a stage's parameters after each of its backward passes."""

    def parameters_at_hand(self) -> AbstractContextManager[None]:
        """Forward passes outside of a step."""


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """This rank's stages of a model, and what is sent between stages."""

    plan: PipelinePlan
    parts: Sequence[LanguageModel]
    rows: int
    """B of every micro-batch."""
    seq_length: int
    """The whole T."""
    sequence_parts: int
    """Over how many ranks sequence parallelism spreads what stages exchange."""
    stream_shapes: tuple[tuple[int, ...], ...]
    """Of each tensor between stages, or of what a tensor-parallel rank holds of it."""
    dtype: torch.dtype
    device: torch.device
    group: ProcessGroup
    shared: tuple[nn.Parameter, ...] = ()
    """Parameters of this rank of which another stage holds a copy."""
    shared_over: ProcessGroup | None = None
    """The ranks that hold them."""

    @classmethod
    def of(
        cls, config: RunConfig, context: RankContext, plan: PipelinePlan, parts: Sequence[LanguageModel]
    ) -> "PipelineSpec":
        """The spec of this rank; every rank of the job calls it."""
        batch, tp, rank = config.batch, context.groups.tensor.size, context.groups.pipeline.rank
        ends = context.groups.subgroup(Axis.PP, plan.ends) if plan.copied else None
        parameters = dict(parts[0 if rank == plan.ends[0] else -1].named_parameters())
        sequence_parts = tp if config.parallel.sequence_parallel else 1
        return cls(
            plan=plan,
            parts=parts,
            rows=batch.micro_size,
            seq_length=batch.seq_length,
            sequence_parts=sequence_parts,
            stream_shapes=parts[0].stream_shapes(batch.micro_size, batch.seq_length, sequence_parts),
            dtype=DTYPES[config.precision.dtype],
            device=context.device,
            group=context.groups.pipeline.group,
            shared=tuple(parameters[name] for name in plan.copied) if ends is not None else (),
            shared_over=ends,
        )

    def runner(self, gradients: Gradients) -> "Pipeline":
        """The pipeline; every rank of the group calls it."""
        return Pipeline(self, gradients)


class Pipeline:
    """Takes the micro-batches of a step through the whole pipeline: a runner of `megalm.engine`."""

    def __init__(self, spec: PipelineSpec, gradients: Gradients) -> None:
        self._spec, self._gradients = spec, gradients
        self._rank, self._last = dist.get_rank(spec.group), len(spec.plan.layers) - 1
        self._parts = dict(zip(spec.plan.stages(self._rank), spec.parts, strict=True))
        self._inputs = StepInputs()
        self._schedules: dict[int, Any] = {}
        dist.barrier(spec.group)  # NCCL makes a group's communicator at its first collective, not at a send

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The losses, and what each weighs."""
        return self._spec.parts[0].loss_weights

    @property
    def stages(self) -> str:
        """Who holds which layers, and the schedule."""
        return f"{self._spec.plan.schedule}; {self._spec.plan}"

    def counts(self, batch: Batch) -> Losses:
        """What the denominators of the losses are sums of."""
        return self._spec.parts[0].counts(batch)

    def train(
        self, batches: Sequence[Batch], scales: Mapping[str, float], loss_scale: float, on_losses: OnLosses
    ) -> None:
        """Gradients of the scaled losses of all micro-batches; `on_losses` is called on the last stage's rank."""
        inputs = self._inputs
        inputs.batches, inputs.on_losses = batches, on_losses
        inputs.scales = {name: scale * loss_scale for name, scale in scales.items()}
        with self._gradients.collected() as inputs.on_gradients:
            self._schedule(len(batches)).step(target=torch.arange(len(batches)), return_outputs=False)

    def _schedule(self, micro_batches: int) -> Any:
        """The schedule of a step of so many micro-batches; kept until their number changes."""
        if micro_batches not in self._schedules:
            stages = [self._stage(number, part) for number, part in self._parts.items()]
            built = build_schedule(self._spec.plan.schedule, stages, micro_batches, _started_from)
            self._schedules = {micro_batches: built}
        return self._schedules[micro_batches]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_losses: OnLosses) -> None:
        """Forward of all micro-batches; `on_losses` is called on the last stage's rank."""
        self._run(batches, lambda part, stream, batch: on_losses(part.losses(stream, batch), batch))

    @torch.no_grad()
    def logits_at(self, fields: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
        """Logits (B, places, V) of a batch of these fields, without vocabulary padding, on every rank.

        The fields are padded to the shape that the stages exchange, a whole micro-batch: none may be larger.
        """
        spec, rows = self._spec, len(fields["tokens"])
        vocab_size = spec.parts[0].config.vocab_size or 0
        logits_BPV = torch.empty(rows, len(places), vocab_size, dtype=spec.dtype, device=spec.device)

        def at_end(part: LanguageModel, stream: Stream, _batch: Batch) -> None:
            logits_BPV.copy_(part.logits(stream)[:rows, list(places), :vocab_size])

        self._run([TensorBatch(tensors={name: self._whole(name, field) for name, field in fields.items()})], at_end)
        dist.broadcast(logits_BPV, group=spec.group, group_src=self._holder(self._last))
        return logits_BPV

    def _whole(self, name: str, field: Tensor) -> Tensor:
        """A field of a few rows as one of a micro-batch; rows come again, so that none is padding alone."""
        spec = self._spec
        decoder = spec.parts[0].config.decoder_seq_length if name.startswith("decoder_") else None
        rows = torch.arange(spec.rows, device=field.device) % len(field)
        return F.pad(field, (0, (decoder or spec.seq_length) - field.shape[1]))[rows]

    def _run(self, batches: Sequence[Batch], at_end: Callable[[LanguageModel, Stream, Batch], None]) -> None:
        """Forward of all micro-batches; `at_end` gets each on the last stage.

        A rank takes as many micro-batches as there are ranks through one stage, then through its next. All ranks keep
        this order and a stage only waits for an earlier one, so nobody waits in a circle.
        """
        kept: dict[tuple[int, int], Stream] = {}
        sending: list[Any] = []
        ranks = self._spec.plan.num_ranks
        with self._gradients.parameters_at_hand():
            for start in range(0, len(batches), ranks):
                for number, part in self._parts.items():
                    for index, batch in enumerate(batches[start : start + ranks], start):
                        stream = part.embed(batch) if number == 0 else self._received(number, index, kept, batch)
                        stream = part.run_layers(stream, batch)
                        if number == self._last:
                            at_end(part, stream, batch)
                        elif number + 1 in self._parts:
                            kept[number + 1, index] = stream
                        else:
                            sending += [(self._send(x, number + 1), x) for x in stream]
        for work, _ in sending:
            work.wait()

    def _received(self, number: int, index: int, kept: dict[tuple[int, int], Stream], batch: Batch) -> Stream:
        """What stage `number` gets of micro-batch `index`: from this rank's own earlier stage, or by a receive."""
        if number - 1 in self._parts:
            return kept.pop((number, index))
        spec = self._spec
        shapes = spec.parts[0].stream_shapes(len(batch["tokens"]), spec.seq_length, spec.sequence_parts)
        stream = tuple(torch.empty(shape, dtype=spec.dtype, device=spec.device) for shape in shapes)
        for x in stream:
            dist.recv(x, group=spec.group, group_src=self._holder(number - 1))
        return stream

    def _send(self, x: Tensor, stage: int) -> Any:
        return dist.isend(x, group=self._spec.group, group_dst=self._holder(stage))

    def _holder(self, stage: int) -> int:
        return rank_of_stage(self._spec.plan.schedule, stage, self._spec.plan.num_ranks)

    def _stage(self, number: int, part: LanguageModel) -> ModelStage:
        spec = self._spec
        module = StageModule(part, number == 0, number == self._last)
        stream = tuple(
            torch.empty(shape, dtype=spec.dtype, device="meta").requires_grad_() for shape in spec.stream_shapes
        )
        loss = torch.empty((), dtype=torch.float32, device="meta").requires_grad_()
        return ModelStage(
            module,
            self._inputs,
            number,
            len(spec.plan.layers),
            spec.device,
            input_args=() if module.is_first else stream,
            output_args=loss if module.is_last else stream,
            group=spec.group,
        )


def _started_from(loss: Tensor, _target: Tensor) -> Tensor:
    """What the last stage starts its backward from. torch wants a target beside the output; it is not used."""
    return loss
