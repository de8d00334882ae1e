"""Each fault of DeepSpeed or torch that deepspeed_patches.py works around is still there without its function.

A test that fails here says that upstream no longer needs it: delete the function and the test.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.data.batch import Batch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.engine import deepspeed_patches, engine
from megalm.engine.engine import Engine
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

RECIPE = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 32 --seq-length 8 --micro-batch-size 2 "
    "--max-position-embeddings 8 --global-batch-size 4 --train-iters 3 --lr 0.01 --mock-data --eval-iters 0"
)


def build(flags: str, deepspeed_json: dict[str, Any] | None = None) -> Engine:
    config = load_config([*RECIPE.split(), *flags.split()])
    section = config.engine.model_copy(update={"deepspeed_config": deepspeed_json})
    context = RankContext.of(Mesh.of(1), torch.device("cpu"))
    return build_model_and_engine(config.model_copy(update={"engine": section}), config.model, context)


def batches() -> list[Batch]:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(3))
    return [batch_of(tokens[:, :-1], tokens[:, 1:], seed=0)] * 2


def norms(trainer: Engine) -> list[float]:
    """Gradient norms of two steps that move nothing."""
    return [trainer.train_step(batches(), 0.0).grad_norm for _ in range(2)]


def compiled_by_every_rank() -> bool:
    """Whether DeepSpeed would compile its shared-memory collectives."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    backend = importlib.import_module("deepspeed.comm.torch")
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": True}  # what it would find out with the compiler
    builder = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    builder.load = lambda _self: "compiled"
    found = backend.build_shm_op()
    deepspeed_patches.without_shared_memory_collectives()
    return found == "compiled" and backend.build_shm_op() is None


def test_deepspeed_compiles_shared_memory_collectives_on_cpus() -> None:
    assert run_on_ranks(1, compiled_by_every_rank) == [True]


def given_to_torchs_compiler(patched: bool) -> int:
    """Functions of DeepSpeed's Muon that are given to torch.compile when it is imported."""
    given: list[Any] = []
    torch.compile = lambda function: given.append(function) or function  # type: ignore[assignment]
    if patched:
        deepspeed_patches.without_compiled_muon()
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return len(given)


def test_deepspeed_compiles_a_muon_that_nobody_uses() -> None:
    alone, patched = (run_on_ranks(1, given_to_torchs_compiler, patched)[0] for patched in (False, True))
    assert alone > 0
    assert patched == 0


def works_without_dynamo(patched: bool) -> bool:
    """Whether an optimizer is built, steps and is saved where torch's compiler cannot be imported."""
    sys.modules["torch._dynamo"] = None  # type: ignore[assignment]
    if patched:
        deepspeed_patches.without_dynamo_in_optimizers()
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    try:
        optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
    except ImportError:
        return False
    return torch.allclose(parameter, torch.full((2,), 0.5)) and parameter.grad is None


def test_torchs_optimizers_load_its_compiler() -> None:
    assert [run_on_ranks(1, works_without_dynamo, patched)[0] for patched in (False, True)] == [False, True]


def deprecated_calls(patched: bool) -> int:
    """Warnings of torch about calls that DeepSpeed makes in a step."""
    if not patched:
        deepspeed_patches.silence = lambda: None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        norms(build("--zero-stage 3"))
    return sum(warning.category is FutureWarning and "distributed" in str(warning.message) for warning in seen)


def test_deepspeed_calls_collectives_by_deprecated_names() -> None:
    alone, patched = (run_on_ranks(1, deprecated_calls, patched)[0] for patched in (False, True))
    assert alone > 0
    assert patched == 0


def fp16_without_onednn() -> tuple[bool, bool, bool]:
    """Whether DeepSpeed takes fp16 where oneDNN has no fast products, first alone, then patched; whether torch does."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: False
    alone = accelerator.is_fp16_supported()
    deepspeed_patches.allow_fp16_on_cpu()
    product = torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)
    return bool(alone), accelerator.is_fp16_supported(), bool((product == 2).all())


def test_deepspeed_refuses_fp16_on_cpus_that_can() -> None:
    assert run_on_ranks(1, fp16_without_onednn) == [(False, True, True)]


def test_torchs_lock_of_a_compiler_outlives_its_process(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    killed = FileBaton(str(tmp_path / "lock"))
    assert killed.try_acquire()
    del killed
    assert not FileBaton(str(tmp_path / "lock")).try_acquire(), "torch finds out that the holder is gone"


def gradients_while_the_scale_grows(patched: bool) -> float:
    """L2 norm of Adam's first moment after four equal gradients under a loss scale that grows with every good step."""
    if not patched:
        engine.grow_scale_after_step = lambda scaler: None
    trainer = build("--fp16 --zero-stage 1 --initial-loss-scale 1024 --loss-scale-window 1 --clip-grad 0")
    for _ in range(2):
        norms(trainer)
    return float(sum(piece.moments["exp_avg"].square().sum() for piece in trainer.state_slices())) ** 0.5


def test_deepspeed_divides_gradients_by_the_scale_of_the_next_step() -> None:
    right, wrong = (run_on_ranks(1, gradients_while_the_scale_grows, patched)[0] for patched in (True, False))
    assert wrong < 0.8 * right


def reductions(stage: int) -> tuple[int, int]:
    """Sums over the ranks of a model copy in a step, without and with the patch."""
    from deepspeed.comm import ReduceOp

    small = {"zero_optimization": {"sub_group_size": 1000, "reduce_bucket_size": 5000}}
    trainer = build(f"--zero-stage {stage}", small)
    counts = []
    for patch in (lambda: None, lambda: deepspeed_patches.agree_on_norm(trainer.ds_engine.optimizer, stage)):
        optimizer = trainer.ds_engine.optimizer
        calls: list[Any] = []
        optimizer._grad_norm_counts_every_rank = lambda *_: False  # as on a rank of a pipeline
        optimizer._model_parallel_all_reduce = lambda tensor, op, calls=calls: calls.append(op)
        patch()
        norms(trainer)
        counts.append(sum(op == ReduceOp.SUM for op in calls) // 2)
    return counts[0], counts[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_reduces_the_norm_once_for_each_group(stage: int) -> None:
    alone, patched = run_on_ranks(1, reductions, stage)[0]
    assert alone > 1
    assert patched == 1


def counted_elsewhere() -> float:
    """The norm that ZeRO 3 gives for a gradient that another rank counts."""
    optimizer = build("--zero-stage 3").ds_engine.optimizer
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_pipe_replicated, parameter.model_parallel, parameter.ds_id = True, False, 0
    return float(optimizer.get_grad_norm_direct([torch.tensor([3.0, 4.0])], [parameter]))


def test_zero_3_counts_what_another_pipeline_rank_counts() -> None:
    assert run_on_ranks(1, counted_elsewhere) == [5.0]


def hooked(stage: int) -> list[int]:
    """How many gradients of a backward pass DeepSpeed takes at once, before and after its hooks are removed."""
    trainer, batch = build(f"--zero-stage {stage}"), batches()[0]
    optimizer, counts = trainer.ds_engine.optimizer, []
    for remove in (lambda: None, lambda: deepspeed_patches.remove_gradient_hooks(optimizer)):
        taken: list[Any] = []
        optimizer.process_gradients = lambda *args, taken=taken: taken.append(args)
        remove()
        trainer.ds_engine.module(batch)["lm"].sum().backward()
        counts.append(len(taken))
    return counts


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_takes_gradients_in_hooks(stage: int) -> None:
    before, after = run_on_ranks(1, hooked, stage)[0]
    assert before > 0
    assert after == 0


def kept_of_the_step_before(patched: bool) -> float:
    """What ZeRO 3 adds to a gradient whose stage is not the first to have one in this step."""
    optimizer = build("--zero-stage 3").ds_engine.optimizer
    optimizer.grad_partitions_flat_buffer.fill_(5.0)
    if patched:
        deepspeed_patches.accumulate_from_zero(optimizer, 3)
    optimizer.micro_step_id = 1  # another stage was the first
    parameter = optimizer.fp16_groups[0][0]
    deepspeed_patches.set_gradient(parameter, torch.ones(parameter.ds_shape))
    optimizer.reduce_ready_partitions_and_remove_grads(parameter)
    optimizer.overlapping_partition_gradients_reduce_epilogue()
    _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return float(optimizer.grad_partitions_flat_buffer[offset]) - 1.0


def test_zero_3_adds_to_the_gradients_of_the_step_before() -> None:
    assert [run_on_ranks(1, kept_of_the_step_before, patched)[0] for patched in (False, True)] == [5.0, 0.0]


def gathered_outside_of_forward() -> tuple[int, int, int]:
    """Elements of a weight of another module, read outside of the engine's forward: alone, patched; its real number."""
    trainer = build("--zero-stage 3", {"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    model = trainer.ds_engine.module
    linear = next(module for module in model.layers["0"].mlp.modules() if "weight" in module._parameters)
    alone = linear.weight.numel()
    with deepspeed_patches.parameters_at_hand(model):
        patched = linear.weight.numel()
    return alone, patched, linear.weight.ds_numel


def test_zero_3_gathers_foreign_parameters_only_in_its_own_forward() -> None:
    alone, patched, whole = run_on_ranks(1, gathered_outside_of_forward)[0]
    assert alone == 0
    assert patched == whole


def test_torch_wants_a_gradient_in_the_shape_of_the_values_that_are_there() -> None:
    parameter, gradient = nn.Parameter(torch.empty(0)), torch.ones(2, 3)
    with pytest.raises(RuntimeError):
        parameter.grad = gradient
    deepspeed_patches.set_gradient(parameter, gradient)
    assert parameter.grad is gradient
    assert parameter.numel() == 0


def test_every_function_has_a_test() -> None:
    text = Path(__file__).read_text()
    public = [
        name
        for name, thing in vars(deepspeed_patches).items()
        if isinstance(thing, Callable) and getattr(thing, "__module__", "") == deepspeed_patches.__name__
    ]
    assert [name for name in public if not name.startswith("_") and f".{name}" not in text] == []
