"""Every place where megalm changes DeepSpeed or torch, or reaches behind their public face; a function each.

Written for DeepSpeed 0.19.8 and torch 2.13. tests/engine/test_deepspeed_patches.py runs them without each: where the
fault is gone, the test fails, and the function can go. DeepSpeed takes two seconds to import, so each function does it.
"""

import importlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

_INVALID = -1.0  # DeepSpeed's word for a norm that is not finite


def silence() -> None:
    """DeepSpeed's lines below errors are not shown, nor torch's warnings about calls that DeepSpeed makes.

    DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, with a warning each call and rank.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def without_shared_memory_collectives() -> None:
    """Keep DeepSpeed 0.19 from compiling collectives over shared memory of its own on CPUs.

    Every rank compiles them at first use, past the start-up bound, and they leave segments in /dev/shm when a rank is
    killed. To learn whether it can, every rank would also try the compiler for each of DeepSpeed's operators.
    """
    # deepspeed.comm.torch, as a name, is torch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def without_compiled_muon() -> None:
    """Keep DeepSpeed 0.19 from loading torch's code generator for its own Muon, which megalm does not use.

    Every engine imports that optimizer, and its module gives three functions to torch.compile: a third of the time
    in which a rank starts.
    """
    from deepspeed.runtime import compiler

    compile_of_deepspeed, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_of_deepspeed


def without_dynamo_in_optimizers() -> None:
    """Keep torch 2.13 from loading its compiler to mark, at their first call, methods of optimizers as not compiled.

    That is a quarter of the time in which a rank starts. The marks only count inside of compiled functions, and no
    optimizer of ours is built, saved, loaded or stepped in one.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        plain = method.__wrapped__  # type: ignore[union-attr]
        setattr(plain, "__dynamo_disable", plain)
    Adam.step = torch.no_grad()(inspect.unwrap(Adam.step))  # type: ignore[method-assign]


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed 0.19 train in fp16 on every CPU.

    It does so only where oneDNN has fast fp16 products; torch computes them on all.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def grow_scale_after_step(scaler: Any) -> Callable[[bool], None]:
    """Make DeepSpeed's loss scaler leave the scale of a good step alone; returns what lets it grow afterwards.

    ZeRO 1 to 3 of DeepSpeed 0.19 update the scale before they divide the gradients by it, so that each growth would
    halve a step.
    """
    update: Callable[[bool], None] = scaler.update_scale
    scaler.update_scale = lambda overflow: update(True) if overflow else None
    return update


def remove_gradient_hooks(optimizer: Any) -> None:
    """Take DeepSpeed's reduction off autograd's hooks, which it (0.19) sets on every parameter at ZeRO 1 to 3.

    Schedules of pipelines run backward passes of single stages, in their own order, zero-bubble ones without hooks.
    """
    for hook in getattr(optimizer, "_grad_acc_hooks", []):
        hook.remove()


def accumulate_from_zero(optimizer: Any, zero_stage: int) -> None:
    """Begin a step in which ZeRO 2 and 3 add all gradients to zero.

    DeepSpeed 0.19 copies what comes first and adds what comes later, by a count of backward passes of the whole model;
    the stages of a pipeline see their first micro-batch at different times.
    """
    if zero_stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer.micro_step_id = 1
    elif zero_stage == 2 and optimizer.cpu_offload:
        for held in optimizer.accumulated_grads_in_cpu.values():
            held.zero_()
        optimizer.micro_step_id = 0  # becomes 1 at the first reduction


@contextmanager
def parameters_at_hand(model: nn.Module) -> Iterator[None]:
    """Let modules under ZeRO-3 gather parameters that they do not own, as the forward pass of DeepSpeed's engine does.

    Parts of a model that a pipeline calls do not go through it. DeepSpeed's trace of the order of modules (0.19), by
    which it fetches parameters ahead, stays off: it supposes that all ranks run the same modules.
    """
    modules = list(model.modules())
    for module in modules:
        module._parameters._in_forward = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module._parameters._in_forward = False  # type: ignore[attr-defined]


def set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """`parameter.grad = gradient`, also where ZeRO-3 has taken the values away and torch would miss their shape."""
    values = parameter.data
    parameter.data = values.new_empty(1).expand(gradient.shape)
    parameter.grad = gradient
    parameter.data = values


def agree_on_norm(optimizer: Any, zero_stage: int) -> None:
    """Let the ranks of a model copy add up their norms once a step; `optimizer` is DeepSpeed's of ZeRO 1 to 3.

    DeepSpeed 0.19 does it for each parameter group, and at stage 3 for each run of `sub_group_size` elements. Of these
    every stage has its own number (a stage with the embedding alone has no group of norms and biases), and ranks that
    take part in different numbers of reductions wait for ever. Stage 3 also counts what another rank counts.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import ReduceOp
    from deepspeed.runtime.utils import combine_grad_norm_groups

    name = "_get_norm_groups" if zero_stage == 3 else "scaled_global_norm"
    if not hasattr(optimizer, name):  # BF16_Optimizer adds up once
        return
    of_rank, add_up = getattr(optimizer, name), optimizer._model_parallel_all_reduce

    def of_copy() -> Any:
        found = of_rank()
        norm = combine_grad_norm_groups(found) if zero_stage == 3 else found
        squared = float(norm) ** 2 if norm >= 0 else math.inf
        summed = torch.tensor(squared, dtype=torch.float64, device=get_accelerator().current_device_name())
        add_up(tensor=summed, op=ReduceOp.SUM)
        total = summed.sqrt() if torch.isfinite(summed) else torch.full_like(summed, _INVALID)
        return [total.float()] if zero_stage == 3 else total.float()

    setattr(optimizer, name, of_copy)
    optimizer._model_parallel_all_reduce = lambda tensor, op: add_up(tensor, op) if op != ReduceOp.SUM else None
    if zero_stage == 3:
        _norm_of_owned(optimizer)


def _norm_of_owned(optimizer: Any) -> None:
    """Let ZeRO-3's norm leave out what is marked `ds_pipe_replicated`, as ZeRO 1 and 2 do (DeepSpeed 0.19)."""
    norm, offloaded_norm = optimizer.get_grad_norm_direct, optimizer.complete_grad_norm_calculation_for_cpu_offload

    def of_counted(gradients: Iterable[Tensor], parameters: Iterable[Any], norm_type: float = 2) -> Any:
        parameters = list(parameters)
        counted = [
            torch.zeros_like(gradient) if parameter.ds_pipe_replicated else gradient
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return norm(counted, parameters, norm_type)

    def of_counted_offloaded(parameters: Iterable[Any]) -> Any:
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.ds_pipe_replicated:
                optimizer.norm_for_param_grads.pop(optimizer.get_param_id(parameter), None)
        return offloaded_norm(parameters)

    optimizer.get_grad_norm_direct = of_counted
    optimizer.complete_grad_norm_calculation_for_cpu_offload = of_counted_offloaded
