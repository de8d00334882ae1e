"""Activation recomputation: values of the forward pass are dropped and made again in the backward pass.

Applied to a built model, after every other replacement of its parts. Gradients stay equal to the bit: the same
operators run again on the same values, and dropout draws the same numbers.

* full: whole layers, by `torch.utils.checkpoint` (Chen et al. 2016, arXiv:1604.06174).
* selective: the outputs of norms, attention core and MLP activation, which are large and cheap to make again
  (Korthikanti et al. 2022, arXiv:2205.05198, section 5). Linear layers read these outputs and save them for the
  backward pass; at the end of each layer their storage is emptied, and it is filled again when the gradient arrives at
  the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from megalm.config.recompute import RecomputeConfig
from megalm.errors import ConfigError
from megalm.models.contract import LanguageModel, LayerStep, Stream, run_in_order

SELECTED = ("attention.core",)
"""Modules of a layer whose output is recomputed, besides every function called `activation` of its modules."""
OPTIONAL = (
    *("attention_norm", "mlp_norm", "attention.q_norm", "attention.k_norm"),
    *("cross_attention.core", "cross_attention_norm"),
)
"""The same, where the layer has them."""


def apply_recompute(model: LanguageModel, config: RecomputeConfig) -> None:
    """Make `model` (a whole one or a stage) recompute as `config` says, in place. Parameters keep their names.

    Raises:
        ConfigError: selective recomputation finds a layer without norms, attention core or activation.
    """
    if config.recompute_granularity == "full":
        draws = model.config.attention_dropout > 0 or model.config.hidden_dropout > 0
        model.layer_runner = FullRecompute(config, len(model.layers), draws)
    elif config.recompute_granularity == "selective":
        outputs = CheckpointWithoutOutput()
        for number, layer in model.layers.items():
            _select(number, layer, outputs, draws=model.config.attention_dropout > 0)
        model.layer_runner = partial(_run_discarding, outputs)


class FullRecompute:
    """Runs groups of layers of which only the input is kept, then layers that keep everything (method block)."""

    def __init__(self, config: RecomputeConfig, num_layers: int, draws: bool) -> None:
        count = config.recompute_num_layers
        if config.recompute_method == "block":
            self.groups = [slice(layer, layer + 1) for layer in range(min(count, num_layers))]
        else:
            self.groups = [slice(start, start + count) for start in range(0, num_layers, count)]
        self.kept = slice(self.groups[-1].stop if self.groups else 0, None)
        self.draws = draws

    def __call__(self, steps: Sequence[LayerStep], stream: Stream) -> Stream:
        """The stream after all `steps`."""
        for group in self.groups:
            stream = checkpoint(run_in_order, steps[group], stream, use_reentrant=False, preserve_rng_state=self.draws)
        return run_in_order(steps[self.kept], stream)


class CheckpointWithoutOutput:
    """The outputs that the layer running now will drop."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []

    def note(self, output: Tensor) -> Tensor:
        """`output` of a `_Recomputed` function, to be dropped when the layer ends; nothing without gradients."""
        if output.grad_fn is not None:
            self._outputs.append(output)
        return output

    def discard_and_recompute(self, before: Stream, after: Stream) -> Stream:
        """Drop what was noted; it comes back when the gradient of what the layer made of the stream arrives."""
        if self._outputs:
            dropped = [_Dropped(output) for output in self._outputs]
            self._outputs = []
            for passed, made in zip(before, after, strict=True):
                if made is not passed and made.requires_grad:
                    made.register_hook(partial(_restore_all, dropped))  # type: ignore[no-untyped-call]
        return after


class _Dropped:
    """The emptied storage of an output, and the autograd node that knows how to make it again."""

    def __init__(self, output: Tensor) -> None:
        self.node: Any = output.grad_fn
        self.output = output.data  # shares the storage, not the version: to autograd nothing has been written
        self.nbytes = output.untyped_storage().nbytes()
        output.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Fill the storage, which the consumers of the output have saved, with the same values."""
        self.node.again = _recompute(self.node)
        self.output.untyped_storage().resize_(self.nbytes)
        self.output.copy_(self.node.again[1][0].data)


def _restore_all(dropped: list[_Dropped], _gradient: Tensor) -> None:
    for output in dropped:  # in the order of the forward pass: later ones read earlier ones
        output.restore()
    dropped.clear()


def _run_discarding(outputs: CheckpointWithoutOutput, steps: Sequence[LayerStep], stream: Stream) -> Stream:
    """As `run_in_order`, and each layer drops what it noted on `outputs`."""
    for step in steps:
        stream = outputs.discard_and_recompute(stream, step(stream))
    return stream


def _select(number: str, layer: nn.Module, outputs: CheckpointWithoutOutput, draws: bool) -> None:
    """Replace what `SELECTED` names in one layer by its recomputed form."""
    found = set()
    for name, module in layer.named_modules():
        if name in SELECTED + OPTIONAL and not isinstance(module, nn.Identity):
            _recompute_module(module, outputs, draws=draws and name.endswith("attention.core"))
            found.add(name)
        if hasattr(module, "activation"):
            module.activation = partial(_recomputed_function, module.activation, outputs)
            found.add("activation")
    missing = sorted({*SELECTED, "activation"} - found)
    if missing:
        raise ConfigError(
            f"recompute_granularity=selective finds no {' and no '.join(missing)} in layer {number}; "
            "use --recompute-granularity full"
        )


def _recompute_module(module: nn.Module, outputs: CheckpointWithoutOutput, draws: bool) -> None:
    """Give one module a forward whose output is recomputed. It stays the same module: names and hooks do not change."""
    kind: Any = type(module)
    keep = _generator_states if draws else _no_states

    def forward(self: nn.Module, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        inputs = tuple(takewhile(lambda argument: isinstance(argument, Tensor), arguments))
        names, rest = tuple(self._parameters), arguments[len(inputs) :]
        parameters = [self._parameters[name] for name in names]
        if len(inputs) == 2 and hasattr(kind, "of_sum"):  # the sum is the residual stream, which is kept
            function = partial(_call_with_parameters, kind.of_sum, self, names, rest)
            y, total = _recomputed(function, keep, inputs[0] + inputs[1], *parameters)
            return outputs.note(y), total
        function = partial(_call_with_parameters, kind.forward, self, names, rest)
        return outputs.note(_recomputed(function, keep, *inputs, *parameters))

    module.__class__ = type("Recomputed" + kind.__name__, (kind,), {"forward": forward})


def _call_with_parameters(
    forward: Callable[..., Any], module: nn.Module, names: tuple[str, ...], rest: tuple[Any, ...], *tensors: Tensor
) -> Any:
    """forward(inputs, rest) with the last tensors in place of the module's own parameters.

    ZeRO-3 takes a parameter's values away after the forward pass; the values that it had then are the ones needed.
    """
    own = module._parameters
    count = len(tensors) - len(names)
    module.__dict__["_parameters"] = dict(zip(names, tensors[count:], strict=True))
    try:
        return forward(module, *tensors[:count], *rest)
    finally:
        module.__dict__["_parameters"] = own


def _recomputed_function(function: Callable[..., Tensor], outputs: CheckpointWithoutOutput, *inputs: Tensor) -> Tensor:
    return outputs.note(_recomputed(function, _no_states, *inputs))


class _Recomputed(torch.autograd.Function):
    """Forward: function(tensors), one result or several. Backward: its gradient, by running it again on the tensors.

    The run that restores a dropped output, which is the first result, serves the gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], keep: Callable[[Tensor], Any], *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.function, ctx.again = function, None
        ctx.drawing = keep(tensors[0])
        # not the tensors themselves: under ZeRO-3 a parameter will have lost its values
        ctx.save_for_backward(*(tensor.detach() for tensor in tensors))
        results: Tensor | tuple[Tensor, ...] = function(*tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, results = ctx.again or _recompute(ctx)
        ctx.again = None
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(results, wanted, gradients))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


_recomputed: Callable[..., Any] = _Recomputed.apply


def _recompute(node: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs of a `_Recomputed` node as leaves, and its results from them with a graph of their own."""
    wanted = node.needs_input_grad[2:]
    tensors = tuple(
        tensor.detach().requires_grad_(needed) for tensor, needed in zip(node.saved_tensors, wanted, strict=True)
    )
    with torch.enable_grad(), node.drawing():
        results = node.function(*tensors)
    return tensors, results if isinstance(results, tuple) else (results,)


def _no_states(_tensor: Tensor) -> Callable[[], Any]:
    return nullcontext


def _generator_states(tensor: Tensor) -> Callable[[], Any]:
    """A context in which torch's generators draw once more what they draw from here on."""
    return partial(_drawing_again, torch.get_rng_state(), *get_device_states(tensor))


@contextmanager
def _drawing_again(cpu_state: Tensor, devices: list[int], device_states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu_state)
        set_device_states(devices, device_states)
        yield
