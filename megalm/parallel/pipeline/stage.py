"""One stage as a function of its micro-batch, and as torch's schedules run it.

Shapes: B micro-batch size, T sequence, D model width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megalm.models.blocks.loss import summed_loss
from megalm.models.gpt.model import GPT

Batch = dict[str, Tensor]


OnGradients = Callable[[Iterable[nn.Parameter]], None]


OnLosses = Callable[[Tensor, Batch], None]


@dataclass
class StepInputs:
    """What the stages read besides the residual stream: the micro-batches of the step that runs."""

    micro_batches: Sequence[Batch] = ()
    seeds: Sequence[int | None] = ()
    grad_scale: float = 0.0
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


class ModelStage(PipelineStage):
    """torch's stage, reading its micro-batches from a `StepInputs` and saying when a chunk's gradients are there.

    Receive buffers live from the receive to the backward pass; torch's own holds one for every micro-batch of the step.
    """

    def __init__(self, module: StageModule, feed: StepInputs, *args: Any, **kwargs: Any) -> None:
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
