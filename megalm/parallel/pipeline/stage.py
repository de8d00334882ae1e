"""One stage as a function of its micro-batch, and as torch's schedules run it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megalm.models.blocks.loss import scaled_total
from megalm.models.contract import Batch, LanguageModel, OnLosses, Past, Stream

OnGradients = Callable[[Iterable[nn.Parameter]], None]


@dataclass
class StepInputs:
    """What the stages read besides the stream: the micro-batches of the step that runs, and who hears of them."""

    batches: Sequence[Batch] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    """What each loss is multiplied by before the backward pass."""
    on_gradients: OnGradients = lambda _parameters: None
    on_losses: OnLosses = lambda _losses, _batch: None


class StageModule(nn.Module):
    """One stage as a function of its micro-batch: stream in (nothing, on the first), stream or loss out."""

    def __init__(self, part: LanguageModel, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.is_first = is_first
        self.is_last = is_last

    def forward(
        self,
        *stream: Tensor,
        batch: Batch,
        scales: Mapping[str, float],
        on_losses: OnLosses | None = None,
        past: Past | None = None,
    ) -> Stream | Tensor:
        """The stream, or on the last stage the sum of all losses, each times its scale: a float32 scalar."""
        stream = self.part.run_layers(self.part.embed(batch) if self.is_first else stream, batch, past)
        if not self.is_last:
            return stream
        losses = self.part.losses(stream, batch)
        if on_losses is not None:
            on_losses({name: loss.detach() for name, loss in losses.items()}, batch)
        return scaled_total(losses, scales)


class ModelStage(PipelineStage):
    """torch's stage, reading its micro-batches from a `StepInputs` and saying when a chunk's gradients are there.

    Receive buffers live from the receive to the backward pass; torch's own holds one for every micro-batch of the step.
    """

    def __init__(self, module: StageModule, inputs: StepInputs, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        self.inputs = inputs
        self.module = module

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """Forward of one micro-batch."""
        inputs = self.inputs
        given = {"batch": inputs.batches[fwd_chunk_id], "scales": inputs.scales, "on_losses": inputs.on_losses}
        return super().forward_one_chunk(fwd_chunk_id, (), given, save_forward_output)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch: all of it, or towards the inputs only."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None
        if full_backward:
            self.inputs.on_gradients(self.module.parameters())

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The rest of the backward of one micro-batch: towards the weights."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.inputs.on_gradients(self.module.parameters())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the stream, into fresh buffers."""
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
