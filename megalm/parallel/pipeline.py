"""Pipeline parallelism: this rank's stages of the model, and a step's micro-batches through all stages.

What travels between stages is the residual stream alone; tokens, labels, positions and document boundaries come to
each stage from the batch, which every pipeline rank loads. Shapes: B micro-batch size, T sequence, D model width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage

from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig, PipelineSchedule
from megalm.config.pipeline import layout_counts, num_stages, schedule_name
from megalm.models.gpt import GPT
from megalm.models.loss import summed_loss, token_count
from megalm.parallel.partition import PartCosts, balanced_layers, layer_ranges
from megalm.parallel.plan import parallelize
from megalm.parallel.region import TensorParallel
from megalm.parallel.schedules import build_schedule, rank_of_stage, stages_of_rank
from megalm.parallel.styles import Shards

TIED = "embedding.tokens.weight"
Batch = dict[str, Tensor]
OnGradients = Callable[[Iterable[nn.Parameter]], None]
OnLosses = Callable[[Tensor, Batch], None]


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Who holds which layers, for the whole pipeline. A pure value."""

    schedule: PipelineSchedule
    num_ranks: int
    layers: tuple[range, ...]
    """Layers of each stage."""

    @classmethod
    def of(cls, parallel: ParallelConfig, model: ModelConfig, seq_length: int) -> "PipelinePlan":
        """The plan that the settings describe; they have been found possible."""
        counts = layout_counts(parallel)
        if counts is not None:
            layers = layer_ranges(counts)
        else:
            costs = PartCosts.of_model(model, seq_length, parallel.pipeline_partition)
            layers = balanced_layers(model.num_layers, num_stages(parallel, model.num_layers), costs)
        ranks = parallel.pipeline_model_parallel_size
        return cls(schedule=schedule_name(parallel), num_ranks=ranks, layers=tuple(layers))

    def stages(self, rank: int) -> list[int]:
        """The stages of one pipeline rank."""
        return stages_of_rank(self.schedule, rank, self.num_ranks, len(self.layers))

    @property
    def ends(self) -> tuple[int, int]:
        """The pipeline ranks of the first and of the last stage."""
        return 0, rank_of_stage(self.schedule, len(self.layers) - 1, self.num_ranks)

    def has_copy(self, model: ModelConfig) -> bool:
        """Whether the last stage has a token embedding of its own, because another rank has the first stage."""
        return model.tied and self.ends[0] != self.ends[1]

    def __str__(self) -> str:
        return ", ".join(
            f"rank {rank}: " + " + ".join(self._describe(stage) for stage in self.stages(rank))
            for rank in range(self.num_ranks)
        )

    def _describe(self, stage: int) -> str:
        numbers = self.layers[stage]
        parts = ["embedding"] if stage == 0 else []
        if len(numbers):
            parts.append(f"layers {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}")
        return ", ".join([*parts, "head"] if stage == len(self.layers) - 1 else parts)


def build_chunks(
    plan: PipelinePlan, rank: int, model: ModelConfig, tensor_parallel: TensorParallel
) -> list[tuple[GPT, Shards]]:
    """The stages of pipeline rank `rank`, on the meta device, and what they hold of the whole model.

    Parameters have the whole model's names. With tied weights the first and the last stage need the token embedding:
    on one rank they use the same, on two the last one's is a copy that does not count.
    """
    last = len(plan.layers) - 1
    rows = model.padded_vocab_size(tensor_parallel.size)
    chunks = []
    for stage in plan.stages(rank):
        ends = {"has_embedding": stage == 0, "has_head": stage == last}
        with torch.device("meta"):
            chunk = GPT(model, rows, layers=plan.layers[stage], **ends)
        chunks.append((chunk, parallelize(chunk, tensor_parallel)))
    if model.tied and rank == plan.ends[1] and last > 0:
        chunk, shards = chunks[-1]
        if plan.has_copy(model):
            shards.placements[TIED] = replace(shards.placements[TIED], counted=False)
        else:
            chunk.embedding.tokens = chunks[0][0].embedding.tokens
    return chunks


class ChunkList(nn.ModuleList):
    """The stages of one rank as one module, whose parameters keep the names of the whole model."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, without the number of the stage in front."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.partition(".")[2], parameter


@dataclass
class Feed:
    """What the stages read besides the residual stream: the micro-batches of the step that runs."""

    micro_batches: Sequence[Batch] = ()
    seeds: Sequence[int | None] = ()
    factor: float = 0.0
    """What losses are multiplied by before the backward pass."""
    on_gradients: OnGradients = field(default=lambda _: None)
    on_losses: OnLosses = field(default=lambda _losses, _batch: None)
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of the losses so far, on the last stage."""


class StageModule(nn.Module):
    """One stage as a function of its micro-batch: residual stream in (none: tokens), residual stream or loss out."""

    def __init__(self, part: GPT, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.is_first = is_first
        self.is_last = is_last

    def forward(
        self, x_BTD: Tensor | None, batch: Batch, seed: int | None, on_losses: OnLosses | None = None
    ) -> Tensor:
        """The residual stream (B, T, D), or on the last stage the sum of losses, a float32 scalar."""
        tokens_BT = batch["tokens"]
        position_ids_BT = batch.get("position_ids")
        if position_ids_BT is None:
            position_ids_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if self.is_first:
            x_BTD = self.part.embed(tokens_BT, position_ids_BT, dropout_seed=seed)
        assert x_BTD is not None, "stages after the first receive the residual stream"
        x_BTD = self.part.run_layers(x_BTD, position_ids_BT, cu_seqlens_BN=batch.get("cu_seqlens"), dropout_seed=seed)
        if not self.is_last:
            return x_BTD
        losses_BT = self.part.token_losses(x_BTD, batch["labels"])
        if on_losses is not None:
            on_losses(losses_BT.detach(), batch)
        return summed_loss(losses_BT, batch["loss_mask"])


class FedStage(PipelineStage):
    """torch's stage, reading its micro-batches from a `Feed` and saying when a chunk's gradients are there.

    Receive buffers live from the receive to the backward pass; torch's own holds one for every micro-batch of the step.
    """

    def __init__(self, module: StageModule, feed: Feed, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        self.feed = feed
        self.module = module

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """Forward of one micro-batch."""
        feed = self.feed
        given = {
            "batch": feed.micro_batches[fwd_chunk_id],
            "seed": feed.seeds[fwd_chunk_id],
            "on_losses": feed.on_losses,
        }
        return super().forward_one_chunk(fwd_chunk_id, (None,) if self.is_first else (), given, save_forward_output)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch: all of it, or towards the inputs only."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None
        if full_backward:
            self.feed.on_gradients(self.module.parameters())

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The rest of the backward of one micro-batch: towards the weights."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.feed.on_gradients(self.module.parameters())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the residual stream, into fresh buffers."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of its gradient, into fresh buffers."""
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        self._release(self.args_recv_info)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        self._release(self.grad_recv_info)

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = info.tensor_meta.to_tensor(self.device).detach()

    @staticmethod
    def _release(infos_by_chunk: dict[int, Any]) -> None:
        for infos in infos_by_chunk.values():
            for info in infos:
                info.buffer = None


class Pipeline:
    """This rank's stages, and the micro-batches of a step through the whole pipeline.

    `shape` is that of the residual stream between stages, (B, T, D), or what a tensor-parallel rank holds of it;
    `seq_length` is the whole T.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        chunks: Sequence[GPT],
        *,
        shape: tuple[int, int, int],
        seq_length: int,
        dtype: torch.dtype,
        device: torch.device,
        group: ProcessGroup,
        num_micro_batches: int,
    ) -> None:
        self.plan = plan
        self.group = group
        self.num_micro_batches = num_micro_batches
        self._rank = dist.get_rank(group)
        self._length = seq_length
        self._vocab_size = chunks[0].config.vocab_size or 0
        self._hidden = torch.empty(shape, dtype=dtype, device="meta").requires_grad_()
        self._device = device
        self._feed = Feed()
        last = len(plan.layers) - 1
        self._modules = {
            number: StageModule(chunk, number == 0, number == last)
            for number, chunk in zip(plan.stages(self._rank), chunks, strict=True)
        }
        stages = [self._stage(number, module) for number, module in self._modules.items()]
        self._schedule = build_schedule(plan.schedule, stages, num_micro_batches, self._loss)
        dist.barrier(group)  # NCCL makes a group's communicator at its first collective, not at a send

    def train(
        self,
        micro_batches: Sequence[Batch],
        seeds: Sequence[int],
        factor: float,
        on_gradients: OnGradients,
        on_losses: OnLosses,
    ) -> Tensor:
        """Forward and backward of all micro-batches; the sum of their losses on the last stage, elsewhere 0.

        Gradients are those of losses x `factor`. `on_gradients` is called with a stage's parameters whenever its
        backward pass of a micro-batch is complete, `on_losses` with the losses (B, T) of a micro-batch and itself.
        """
        feed = self._feed
        feed.micro_batches, feed.seeds, feed.factor = micro_batches, seeds, factor
        feed.on_gradients, feed.on_losses = on_gradients, on_losses
        feed.loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        numbers = torch.arange(self.num_micro_batches)
        self._schedule.step(target=numbers, return_outputs=False)
        return feed.loss_sum

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Forward of all micro-batches: (sum of losses, number of unmasked tokens) on the last stage, else zeros.

        A rank takes as many micro-batches as there are ranks through one stage, then through its next. All ranks keep
        this order and a stage only waits for an earlier one, so nobody waits in a circle.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        kept: dict[tuple[int, int], Tensor] = {}
        sending: list[Any] = []
        for start in range(0, len(micro_batches), self.plan.num_ranks):
            for number, module in self._modules.items():
                for index in range(start, min(start + self.plan.num_ranks, len(micro_batches))):
                    batch = micro_batches[index]
                    y = module(self._received(number, index, kept), batch, None)
                    if module.is_last:
                        sums += torch.stack([y.double(), token_count(batch["loss_mask"])])
                    elif number + 1 in self._modules:
                        kept[number + 1, index] = y
                    else:
                        sending.append((dist.isend(y, group=self.group, group_dst=self._holder(number + 1)), y))
        for work, _ in sending:
            work.wait()
        return sums

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V) of the token after each row of `tokens_BT`, without vocabulary padding, on every rank.

        The rows are padded to the shape that the stages exchange, a whole micro-batch: none may be longer.
        """
        (rows, length), (most, _, _) = tokens_BT.shape, self._hidden.shape
        tokens_BT = F.pad(tokens_BT, (0, self._length - length, 0, most - rows))
        positions_BT = torch.arange(self._length, device=tokens_BT.device)[None]
        kept: dict[tuple[int, int], Tensor] = {}
        for number, module in self._modules.items():
            x_BTD = self._received(number, 0, kept)
            x_BTD = module.part.embed(tokens_BT, positions_BT) if x_BTD is None else x_BTD
            x_BTD = module.part.run_layers(x_BTD, positions_BT)
            if module.is_last:
                logits_BV = module.part.logits(x_BTD)[:rows, length - 1, : self._vocab_size].contiguous()
            elif number + 1 in self._modules:
                kept[number + 1, 0] = x_BTD
            else:
                dist.send(x_BTD, group=self.group, group_dst=self._holder(number + 1))
        last = self._holder(len(self.plan.layers) - 1)
        if self._rank != last:
            logits_BV = torch.empty(rows, self._vocab_size, dtype=self._hidden.dtype, device=self._device)
        dist.broadcast(logits_BV, group=self.group, group_src=last)
        return logits_BV

    def _received(self, number: int, index: int, kept: dict[tuple[int, int], Tensor]) -> Tensor | None:
        """What stage `number` gets of micro-batch `index`: from this rank's own earlier stage, or by a receive."""
        if number == 0:
            return None
        if number - 1 in self._modules:
            return kept.pop((number, index))
        x_BTD = torch.empty(self._hidden.shape, dtype=self._hidden.dtype, device=self._device)
        dist.recv(x_BTD, group=self.group, group_src=self._holder(number - 1))
        return x_BTD

    def _holder(self, stage: int) -> int:
        return rank_of_stage(self.plan.schedule, stage, self.plan.num_ranks)

    def _stage(self, number: int, module: StageModule) -> FedStage:
        loss = torch.empty((), dtype=torch.float32, device="meta").requires_grad_()
        tokens = torch.empty(self._hidden.shape[:2], dtype=torch.int64, device="meta")
        return FedStage(
            module,
            self._feed,
            number,
            len(self.plan.layers),
            self._device,
            input_args=tokens if module.is_first else self._hidden,
            output_args=loss if module.is_last else self._hidden,
            group=self.group,
        )

    def _loss(self, loss_sum: Tensor, number: Tensor) -> Tensor:
        """What the last stage starts its backward from. torch wants a target beside the output; it is not used."""
        self._feed.loss_sum += loss_sum.detach()
        return loss_sum * self._feed.factor
