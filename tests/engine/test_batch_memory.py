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


SPLITS = [(1, 12), (1, 3), (2, 3), (3, 2), (3, 4)]
"""(ranks, rows of a micro-batch)."""


@pytest.mark.parametrize("positions", [2, 5])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("other", SPLITS)
def test_every_row_goes_from_any_split_of_the_batch_to_any_other(
    split: tuple[int, int], other: tuple[int, int], positions: int
) -> None:
    rows = torch.randn(LAYERS, ROWS, positions, WIDTH).bfloat16()
    stored: dict[str, torch.Tensor] = {}
    for memory in memories(*split):
        for number, numbers in own_rows(memory):
            memory.trained(number).advance(dict(enumerate(rows[:, numbers])))
        slices = memory.slices()
        assert len({piece.name for piece in slices}) == len(slices), "a file has one piece of a tensor"
        for piece in slices:
            whole = stored.setdefault(piece.name, torch.full(piece.shard_spec.shape, torch.nan))
            box = piece.shard_spec.box
            assert whole[box.index()].isnan().all(), "one rank writes a row"
            whole[box.index()] = piece.weight.view(box.sizes)
            assert list(piece.tensors(with_moments=False)) == ["memory"]
        if positions == memory.size:
            assert sum(piece.weight.numel() for piece in slices) == memory.written_elements
    for memory in memories(*other):
        shapes = {name: tuple(whole.shape) for name, whole in stored.items()}
        memory.load(shapes, lambda name, _, box: stored[name][box.index()].flatten())
        for number, numbers in own_rows(memory):
            found = memory.trained(number).layers
            assert all(torch.equal(found[layer], rows[layer, numbers]) for layer in range(LAYERS))


def memories(ranks: int, rows: int) -> list[BatchMemory]:
    return [memory_of(rank, ranks, rows) for rank in range(ranks)]


def own_rows(memory: BatchMemory) -> list[tuple[int, slice]]:
    """By micro-batch, as the loader deals samples out."""
    firsts = [(number * memory.ranks + memory.rank) * memory.rows for number in range(memory.micro_batches)]
    return [(number, slice(first, first + memory.rows)) for number, first in enumerate(firsts)]


@pytest.mark.parametrize(
    "shapes",
    [
        {"segment_memory.0": (1, 4, 3, 5, WIDTH)},
        *(
            dict.fromkeys(("segment_memory.0", "segment_memory.1"), shape)
            for shape in ((1, 5, 3, 5, WIDTH), (1, 4, 3, 6, WIDTH), (1, 4, 3, 5, WIDTH + 1), (ROWS, 5, WIDTH))
        ),
    ],
)
def test_the_memory_of_another_run_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="not"):
        memory_of(0, 1, 3).load(shapes, lambda *_: torch.zeros(1))


def test_before_the_first_step_there_is_nothing() -> None:
    memory = memory_of(0, 1, 3)
    memory.load({}, lambda *_: torch.zeros(1))
    assert memory.slices() == []
    other = memory_of(0, 1, 12, is_owner=False)
    other.trained(0).advance(dict.fromkeys(range(LAYERS), torch.zeros(12, 5, WIDTH)))
    assert other.slices() == [], "another rank of the model copy writes it"


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
