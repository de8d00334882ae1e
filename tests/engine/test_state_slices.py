"""What the ranks of each ZeRO stage own, put together, is the model: every element once, with the model's values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.data.batch import Batch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.distributed.shards import StateSlice
from megalm.engine.engine import Engine
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

# odd sizes: the last ranks' parts end in padding, and some parameters are smaller than the number of ranks
RECIPE = (
    "--num-layers 1 --hidden-size 12 --num-attention-heads 2 --ffn-hidden-size 19 --vocab-size 31 --seq-length 8 "
    "--make-vocab-size-divisible-by 1 --max-position-embeddings 8 --global-batch-size 12 --micro-batch-size 2 "
    "--train-iters 3 --lr 0.01 --weight-decay 0.1 --mock-data --eval-iters 0"
)
CPU = torch.device("cpu")
STAGES = [0, 1, 2, 3]


@dataclass
class Held:
    """One rank's part of one engine's state."""

    shapes: dict[str, tuple[int, ...]]
    owned: list[StateSlice]
    model: dict[str, torch.Tensor]
    scalars: dict[str, object]


def build(flags: str) -> Engine:
    config = load_config([*RECIPE.split(), *flags.split()])
    context = RankContext.of(Mesh.of(dist.get_world_size()), CPU)
    return build_model_and_engine(config, config.model, context)


def batches() -> list[Batch]:
    """This rank's micro-batches of one step."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, 31, (2, 9), generator=generator)
    count = 12 // (2 * dist.get_world_size())
    return [batch_of(tokens[:, :-1], tokens[:, 1:])] * count


def held(rows: list[tuple[int, int, str]]) -> list[Held]:
    """What this rank holds, for rows of stage, number of steps, flags."""
    found = []
    for stage, steps, extra in rows:
        engine = build(f"--zero-stage {stage} {extra}")
        for _ in range(steps):
            engine.train_step(batches(), 0.01)
        owned = [clone(piece) for piece in engine.owned_slices()]
        found.append(Held(shapes_of(engine), owned, model_weights(engine), engine.scalars.state()))
    return found


def shapes_of(engine: Engine) -> dict[str, tuple[int, ...]]:
    return {name: shard_spec.shape for name, shard_spec in engine.shard_specs.items()}


def clone(piece: StateSlice) -> StateSlice:
    moments = {kind: view.clone() for kind, view in piece.moments.items()}
    return StateSlice(piece.name, piece.shard_spec, piece.start, piece.stop, piece.weight.clone(), moments)


def model_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter as the model computes with it."""
    import deepspeed

    weights = {}
    for parameter, name in engine.names.items():
        with deepspeed.zero.GatheredParameters(parameter, enabled=engine.zero_stage == 3):
            weights[name] = parameter.detach().float().flatten().clone()
    return weights


EVERY_STAGE = [(stage, 1, "") for stage in STAGES]


@pytest.mark.parametrize(
    ("ranks", "rows"),
    [
        (2, [*EVERY_STAGE, *((stage, 0, "") for stage in STAGES), *((stage, 1, "--bf16") for stage in STAGES)]),
        (3, EVERY_STAGE),
    ],
    ids=["2 ranks", "3 ranks"],
)
def test_owned_slices_tile_every_parameter_once_and_hold_the_models_values(
    ranks: int, rows: list[tuple[int, int, str]]
) -> None:
    by_rank = run_on_ranks(ranks, held, rows)
    for number, (stage, steps, extra) in enumerate(rows):
        parts = [by_rank[rank][number] for rank in range(ranks)]
        shapes = parts[0].shapes
        assert set(shapes) == set(parts[0].model)
        seen = {name: torch.zeros(torch.Size(shape).numel(), dtype=torch.int64) for name, shape in shapes.items()}
        for part in parts:
            for piece in part.owned:
                where = f"stage {stage} {extra} {piece.name} {piece.start}..{piece.stop}"
                assert piece.shard_spec.shape == shapes[piece.name], where
                seen[piece.name][piece.start : piece.stop] += 1
                check(piece, part.model[piece.name], steps, extra, where)
        assert all(bool((count == 1).all()) for count in seen.values()), f"stage {stage}: every element once"
        assert parts[0].scalars == {"optimizer_steps": steps, "loss_scaler": {}}


def check(piece: StateSlice, model: torch.Tensor, steps: int, extra: str, where: str) -> None:
    """A slice has the model's weights, and moments once there was a step."""
    expected = piece.weight.bfloat16().float() if "bf16" in extra else piece.weight
    assert torch.equal(model[piece.start : piece.stop], expected), where
    assert set(piece.moments) == {"exp_avg", "exp_avg_sq"}
    for moment in piece.moments.values():
        assert moment.shape == piece.weight.shape, where
        assert bool(moment.any()) == (steps > 0), where


def after_writing_through_the_views() -> list[tuple[bool, float, float]]:
    """For every stage: whether the written weights are there, and a step's result from them."""
    seen = []
    for stage in STAGES:
        engine = build(f"--zero-stage {stage}")
        for piece in engine.state_slices():
            piece.weight.fill_(0.25)
            piece.moments["exp_avg"].fill_(1.0)
            piece.moments["exp_avg_sq"].fill_(1.0)
        for parameter, name in engine.names.items():
            engine.set_weight(parameter, torch.full(engine.shard_specs[name].shape, 0.25))
        arrived = all(bool((weights == 0.25).all()) for weights in model_weights(engine).values())
        result = engine.train_step(batches(), 0.01)
        after = torch.cat(list(model_weights(engine).values()))
        seen.append((arrived, result.loss, float(after.double().sum())))
    return seen


def test_writing_into_the_views_changes_the_state_that_the_next_step_uses() -> None:
    by_rank = run_on_ranks(2, after_writing_through_the_views)
    assert by_rank[0] == by_rank[1]
    assert all(arrived for arrived, _, _ in by_rank[0])
    losses = [loss for _, loss, _ in by_rank[0]]
    sums = [total for _, _, total in by_rank[0]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-6)


def steps_with_infinite_gradients() -> list[tuple[list[bool], bool, bool]]:
    """For every stage and type: skipped flags of a good, a bad and a good step; state kept by 2nd, 3rd."""
    seen = []
    for flags in NON_FINITE:
        engine = build(flags)
        blow_up = torch.full((), torch.inf if dist.get_rank() == 1 else 1.0)  # on one rank only
        skipped, states = [], []
        for factor in (torch.ones(()), blow_up, torch.ones(())):
            with gradients_times(engine, factor):
                skipped.append(engine.train_step(batches(), 0.01).skipped)
            states.append([clone(piece) for piece in engine.owned_slices()])
        seen.append((skipped, equal(states[0], states[1]), equal(states[1], states[2])))
    return seen


@contextmanager
def gradients_times(engine: Engine, factor: torch.Tensor) -> Iterator[None]:
    """The gradients of all that lies before the final norm are multiplied by `factor`."""
    norm = engine.ds_engine.module.final_norm
    hook = norm.register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(lambda g: g * factor) and None)
    yield
    hook.remove()


def equal(one: list[StateSlice], other: list[StateSlice]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.tensors()[kind], b.tensors()[kind]) for a, b in pairs for kind in a.tensors())


NON_FINITE = [f"--zero-stage {stage} {dtype}" for stage in STAGES for dtype in ("", "--bf16")]


def test_a_step_whose_gradients_are_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    for rows in run_on_ranks(2, steps_with_infinite_gradients):
        for flags, row in zip(NON_FINITE, rows, strict=True):
            assert row == ([False, True, False], True, False), flags
