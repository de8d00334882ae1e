"""What the rows of the batch remember: whose it is, what a checkpoint holds of it, and that evaluations leave it."""

import pytest
import torch

from megalm.engine.batch_memory import BatchMemory
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

LAYERS, WIDTH, ROWS = 2, 3, 12


def memory_of(rank: int, ranks: int, rows: int, *, size: int = 5, is_owner: bool = True) -> BatchMemory:
    return BatchMemory(
        size=size, width=WIDTH, num_layers=LAYERS, rows=rows, micro_batches=ROWS // rows // ranks, rank=rank,
        ranks=ranks, is_owner=is_owner, dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip


def whole(positions: int) -> dict[str, torch.Tensor]:
    """What all ranks remember together."""
    shape = (ROWS, positions, WIDTH)
    return {f"segment_memory.{layer}": torch.randn(shape).bfloat16().float() for layer in range(LAYERS)}


@pytest.mark.parametrize("positions", [2, 5])
@pytest.mark.parametrize(("ranks", "rows"), [(1, 12), (1, 3), (2, 3), (3, 2), (3, 4)])
def test_every_split_of_the_batch_has_and_writes_its_own_rows(ranks: int, rows: int, positions: int) -> None:
    stored, written = whole(positions), {name: torch.full_like(x, torch.nan) for name, x in whole(positions).items()}
    for rank in range(ranks):
        memory = memory_of(rank, ranks, rows)
        memory.load(
            {name: tuple(x.shape) for name, x in stored.items()}, lambda name, _, box: stored[name][box.index()]
        )
        for number in range(memory.micro_batches):
            first = (number * ranks + rank) * rows
            for layer, kept in memory.trained(number).layers.items():
                assert torch.equal(kept.float(), stored[f"segment_memory.{layer}"][first : first + rows])
        for piece in memory.slices():
            assert written[piece.name][piece.shard_spec.box.index()].isnan().all(), "one rank writes a row"
            written[piece.name][piece.shard_spec.box.index()] = piece.weight.view(piece.shard_spec.box.sizes)
            assert list(piece.tensors(with_moments=False)) == ["memory"]
        if positions == memory.size:
            assert sum(piece.weight.numel() for piece in memory.slices()) == memory.written_elements
        assert memory_of(rank, ranks, rows, is_owner=False).slices() == []
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    "shapes",
    [
        {"segment_memory.0": (ROWS, 5, WIDTH)},
        dict.fromkeys(("segment_memory.0", "segment_memory.1"), (ROWS + 1, 5, WIDTH)),
        dict.fromkeys(("segment_memory.0", "segment_memory.1"), (ROWS, 6, WIDTH)),
        dict.fromkeys(("segment_memory.0", "segment_memory.1"), (ROWS, 5, WIDTH + 1)),
    ],
)
def test_the_memory_of_another_run_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="not"):
        memory_of(0, 1, 3).load(shapes, lambda *_: torch.zeros(1))


def test_before_the_first_step_there_is_nothing() -> None:
    memory = memory_of(0, 1, 3)
    memory.load({}, lambda *_: torch.zeros(1))
    assert memory.slices() == []


FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 4 --micro-batch-size 2 --global-batch-size 4 "
    "--train-iters 9 --lr 0.01 --vocab-size 31 --mock-data --eval-iters 0 --segment-memory 6 --sampling consecutive "
    "--position-embedding-type relative --init-method-std 0.2 --zero-stage 1"
)


def evaluated() -> dict[str, object]:
    """Two steps of training with an evaluation of two batches between them, or without."""
    from megalm.assembly import build_model_and_engine
    from megalm.config.merging.load import load_config
    from megalm.config.rules.completion import complete_model
    from megalm.distributed.context import RankContext
    from megalm.distributed.mesh import Mesh

    config = load_config(FLAGS.split())
    config = config.model_copy(update={"model": complete_model(config, None)})
    context = RankContext.of(Mesh.of_config(config.parallel, 1), torch.device("cpu"))
    tokens = torch.randint(0, 31, (4, 16), generator=torch.Generator().manual_seed(0))

    def parts(step: int) -> list:
        own = tokens[:, 4 * step : 4 * step + 4]
        return [batch_of(rows) for rows in own.split(2)]

    found = {}
    for name in ("plain", "between"):
        engine = build_model_and_engine(config, config.model, context)
        losses = [engine.train_step(parts(0), 0.01).loss]
        if name == "between":
            for again in ("first", "again"):
                with engine.evaluation():
                    found[again] = [engine.eval_step(parts(step)).tolist() for step in (2, 3)]
            with engine.evaluation():
                found["alone"] = engine.eval_step(parts(3)).tolist()
        found[name] = [*losses, engine.train_step(parts(1), 0.01).loss]
    return found


def test_an_evaluation_reads_on_from_its_own_beginning_and_leaves_training_as_it_was() -> None:
    (found,) = run_on_ranks(1, evaluated)
    assert found["plain"] == found["between"]
    assert found["first"] == found["again"]
    assert found["first"][1] != found["alone"], "the second batch sees the first"
