"""What the passes of one rank's stages take, found by running them on tensors without values.

The rank's own stages run, forward and backward, on fake tensors (`FakeTensorMode`): shapes and lifetimes are real,
values are not there, nothing is computed. So the figures follow the kernels, the tensor-parallel layers and the
recomputation that a run would use. Of a run of layers that are alike two stand for all (`repeats`).
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.data.batch import Batch
from megalm.models.blocks.segments import LayerMemory, SegmentMemory
from megalm.parallel.pipeline.stage import StageModule
from megalm.planner.repeats import Block, MarkedRunner


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operators inside have made and that still exist."""

    def __init__(self, free: Iterable[Tensor] = ()) -> None:
        """`free`: tensors made before, which are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._free = {tensor.untyped_storage()._cdata for tensor in free}
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.live = 0
        self.peak = 0

    def __enter__(self) -> "LiveStorages":
        resize, count = torch.UntypedStorage.resize_, self._count

        def counted_resize(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            count(storage)
            return result

        self._resize = resize
        # no operator: the mode would not see it. Only while a pass is measured, so it stands here and not among the
        # patches of training (engine/deepspeed_patches.py)
        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._free:
            return
        if key in self._known:
            reference, before = self._known[key]
            if size != before:
                self._known[key] = (reference, size)
        else:
            reference, before = weakref.ref(storage, lambda _: self._forget(key)), 0
            self._known[key] = (reference, size)
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


KeepGradients = Literal["step", "pass", "no"]
"""How long gradients stay with their parameters: until the step ends, until the stage's backward pass ends (pipelines:
then the engine takes them), or not at all (ZeRO takes each as it comes)."""


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """What one micro-batch takes in one stage, beyond what was there before its forward pass."""

    saved: int
    """Kept from the forward to the backward pass."""
    between: int
    """Kept from the backward pass towards the input to the one towards the weights, where they are apart."""
    left: int
    """Gradients at the end of the backward pass, and the bucket that they were reduced in."""
    stays: int
    """Gradients that wait for the end of the step."""
    forward: int
    """The most during the forward pass."""
    backward: int
    """The most during a backward pass towards both."""
    input_backward: int
    weight_backward: int


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """The passes of one stage: the first backward pass finds no gradients, the later ones add to them."""

    first: PassBytes
    later: PassBytes


@dataclass(frozen=True, kw_only=True)
class FakeStage:
    """A stage with as few layers as tell of all."""

    module: StageModule
    """On the meta device; it is given fake parameters."""
    blocks: Sequence[Block]
    """Which layers it has, and for how many each stands."""


@dataclass(frozen=True, kw_only=True)
class FakeRank:
    """The stages of one rank and what runs through them."""

    stages: Sequence[FakeStage]
    fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """(shape, dtype) of each tensor of a micro-batch."""
    stream_shapes: tuple[tuple[int, ...], ...]
    """The stream that this rank receives and sends."""
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    """That of gradients that wait for the end of the step."""
    keep: KeepGradients
    bucket: int
    """Bytes of the buffer that the first gradient of a backward pass brings, until its end."""
    memory_shape: tuple[int, ...] | None = None
    """What a layer remembers of a micro-batch's rows (segment recurrence)."""


def stage_bytes(rank: FakeRank, split: bool) -> list[StageBytes]:
    """The passes of each stage of the rank; `split`: measure backward passes apart as well."""
    modules = nn.ModuleList(stage.module for stage in rank.stages)
    with FakeTensorMode():
        _give_parameters(modules, rank.dtype)
        taking = _Taking(rank)
        for parameter in modules.parameters():
            if rank.keep == "step":
                parameter.grad_dtype = rank.gradient_dtype
            parameter.register_post_accumulate_grad_hook(taking)  # type: ignore[no-untyped-call]
        batch = Batch(tensors={name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in rank.fields.items()})
        # it is there all the time: `StateBytes` has it
        remembered = [] if rank.memory_shape is None else [torch.zeros(rank.memory_shape, dtype=rank.dtype)]
        past = _FullMemory(remembered[0]) if remembered else None
        with LiveStorages([*modules.parameters(), *batch.tensors.values(), *remembered]) as live:
            return [_measured_twice(_Measured(rank, stage, batch, past, taking, live), split) for stage in rank.stages]


class _FullMemory(SegmentMemory):
    """The memory of every layer, which stays as it is: what a pass leaves in it takes the place of what was there."""

    def __init__(self, kept_BMD: Tensor) -> None:
        super().__init__(kept_BMD.shape[1], {0: kept_BMD})

    def layer(self, number: int) -> LayerMemory:
        """The same for each."""
        return _FullLayerMemory(self.layers[0])

    def advance(self, layers: Mapping[int, Tensor]) -> None:
        """Nothing."""


class _FullLayerMemory(LayerMemory):
    def __init__(self, kept_BMD: Tensor) -> None:
        super().__init__(kept_BMD.shape[1], kept_BMD)
        self._kept = self._after = kept_BMD

    def extended(self, x_BTD: Tensor) -> Tensor:
        return torch.cat((self._kept, x_BTD), dim=1)


def _give_parameters(modules: nn.Module, dtype: torch.dtype) -> None:
    """Fake parameters on the CPU in place of those on the meta device."""
    for module in modules.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))


class _Taking:
    """A hook of parameters whose gradient is there: what the engine does with it."""

    def __init__(self, rank: FakeRank) -> None:
        self._keep, self._size = rank.keep, rank.bucket
        self._bucket: Tensor | None = None

    def __call__(self, parameter: Tensor) -> None:
        """Take one gradient."""
        if self._size and self._bucket is None:
            self._bucket = torch.empty(self._size, dtype=torch.uint8)
        if self._keep == "no":
            parameter.grad = None

    def end_pass(self, stage: StageModule) -> None:
        """What a backward pass leaves goes."""
        self._bucket = None
        if self._keep == "pass":
            for parameter in stage.parameters():
                parameter.grad = None


class _Measured:
    """A stage whose passes are measured."""

    def __init__(
        self,
        rank: FakeRank,
        stage: FakeStage,
        batch: Batch,
        past: SegmentMemory | None,
        taking: _Taking,
        live: LiveStorages,
    ) -> None:
        self.rank, self.stage, self.batch, self.taking, self.live = rank, stage.module, batch, taking, live
        self.past = past
        self.marked = MarkedRunner(self.stage.part.layer_runner, stage.blocks)
        self.stage.part.layer_runner = self.marked

    def passes(self, split: bool) -> PassBytes:
        """One micro-batch through the stage and back; with `split` a second one whose backward passes are apart."""
        meter, micro_batch = self._forward()
        saved, forward = meter.read()
        micro_batch.backward()
        left, backward = meter.read()
        self.taking.end_pass(self.stage)
        stays = meter.read()[0] if self.rank.keep == "step" else 0
        between = input_backward = weight_backward = 0
        if split:
            meter, micro_batch = self._forward()
            meter.read()
            micro_batch.backward_input()
            between, input_backward = meter.read()
            micro_batch.backward_weight()
            _, weight_backward = meter.read()
            self.taking.end_pass(self.stage)
        return PassBytes(
            saved=saved,
            between=between,
            left=left,
            stays=stays,
            forward=forward,
            backward=backward,
            input_backward=input_backward,
            weight_backward=weight_backward,
        )

    def _forward(self) -> tuple["_Meter", "_MicroBatch"]:
        meter = _Meter(self.live)
        self.marked.mark = meter.mark
        return meter, _MicroBatch(self.rank, self.stage, self.batch, self.past, self.marked)


def _measured_twice(stage: _Measured, split: bool) -> StageBytes:
    """Where no gradient waits for the next backward pass all passes are as the first."""
    first = stage.passes(split)
    return StageBytes(first=first, later=stage.passes(split) if stage.rank.keep == "step" else first)


class _Meter:
    """Reads live bytes as differences from where it began."""

    def __init__(self, live: LiveStorages) -> None:
        self._live, self._alive, self._peak = live, 0, 0
        self._open(1)

    def mark(self, times: int) -> None:
        """From here to the next mark it is for so many layers as for this one."""
        self._close()
        self._open(times)

    def read(self) -> tuple[int, int]:
        """What is alive, and the most that was since the last reading."""
        self.mark(1)
        peak, self._peak = self._peak, self._alive
        return self._alive, peak

    def _open(self, times: int) -> None:
        self._times, self._start = times, self._live.live
        self._live.peak = self._live.live

    def _close(self) -> None:
        change = self._live.live - self._start
        before_last = self._alive + max(0, (self._times - 1) * change)
        self._peak = max(self._peak, before_last + self._live.peak - self._start)
        self._alive += self._times * change


class _MicroBatch:
    """One micro-batch behind the forward pass of a stage."""

    def __init__(
        self, rank: FakeRank, stage: StageModule, batch: Batch, past: SegmentMemory | None, marked: MarkedRunner
    ) -> None:
        self._stage, self._marked = stage, marked
        shapes = () if stage.is_first else rank.stream_shapes
        self._inputs = [torch.zeros(shape, dtype=rank.dtype, requires_grad=True) for shape in shapes]
        scales = dict.fromkeys(stage.part.loss_weights, 1.0)
        outputs = stage(*self._inputs, batch=batch, scales=scales, past=past)
        self._outputs: list[Tensor] = [outputs] if stage.is_last else list(outputs)
        self._gradients: list[Tensor] | None = None
        self._groups: Any = None

    def backward(self) -> None:
        """The backward pass towards input and weights; what the forward pass had kept goes."""
        self._receive()
        self._whole_backward()

    def backward_input(self) -> None:
        """The backward pass towards the input; the first stage has none, and torch does all in `backward_weight`."""
        self._receive()
        if not self._stage.is_first:
            parameters = self._stage.parameters()
            _, self._groups = stage_backward_input(self._outputs, self._gradients, self._inputs, parameters)

    def backward_weight(self) -> None:
        """The rest of it."""
        if self._stage.is_first:
            self._whole_backward()
        else:
            groups, self._groups = self._groups, None
            for group in self._marked.in_blocks(groups, self._stage.part.layers):
                stage_backward_weight(self._stage.parameters(), group)
            self._release()

    def _receive(self) -> None:
        self._gradients = None if self._stage.is_last else [torch.zeros_like(y) for y in self._outputs]

    def _whole_backward(self) -> None:
        torch.autograd.backward(self._outputs, self._gradients)
        self._release()

    def _release(self) -> None:
        self._inputs, self._outputs, self._gradients = [], [], None
