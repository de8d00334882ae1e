"""Pipeline parallelism: this rank's stages of the model, and a step's micro-batches through all stages.

What travels between stages is the residual stream alone; tokens, labels, positions and document boundaries come to
each stage from the batch, which every pipeline rank loads. Shapes: B micro-batch size, T sequence, D model width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megalm.models.blocks.loss import token_count
from megalm.models.gpt.model import GPT
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.pipeline.schedules import build_schedule, rank_of_stage
from megalm.parallel.pipeline.stage import Batch, ModelStage, OnGradients, OnLosses, StageModule, StepInputs


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
        self._feed = StepInputs()
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
        grad_scale: float,
        on_gradients: OnGradients,
        on_losses: OnLosses,
    ) -> Tensor:
        """Forward and backward of all micro-batches; the sum of their losses on the last stage, elsewhere 0.

        Gradients are those of losses x `grad_scale`. `on_gradients` is called with a stage's parameters whenever its
        backward pass of a micro-batch is complete, `on_losses` with the losses (B, T) of a micro-batch and itself.
        """
        feed = self._feed
        feed.micro_batches, feed.seeds, feed.grad_scale = micro_batches, seeds, grad_scale
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

    def _stage(self, number: int, module: StageModule) -> ModelStage:
        loss = torch.empty((), dtype=torch.float32, device="meta").requires_grad_()
        tokens = torch.empty(self._hidden.shape[:2], dtype=torch.int64, device="meta")
        return ModelStage(
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
        return loss_sum * self._feed.grad_scale
