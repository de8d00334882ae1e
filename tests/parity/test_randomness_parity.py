"""Attention dropout depends on the tensor-parallel size, because each rank draws for its own heads, and on nothing else
of the layout: not on sequence, pipeline and data parallelism."""

import pytest
from layouts import CI, MODELS, RUN, Row
from test_parity import differences, one_process, trained

from megalm.testing.spawner import run_on_ranks

MODEL = "all dropout"
ROWS = [
    Row(2, MODEL, "tp2 sp zero0", CI),
    Row(4, MODEL, "tp2 pp2 zbv zero1"),
    Row(8, MODEL, "tp2 sp pp2 interleaved-1f1b zero2 one-by-one"),
]


def with_tensor_parallel_ranks(row: Row):
    """What two tensor-parallel ranks alone do with the row's micro-batches."""
    micro_batch = " --micro-batch-size 1" if "one-by-one" in row.words else ""
    return run_on_ranks(2, trained, f"{RUN} {MODELS[MODEL]} --zero-stage 0 --tensor-model-parallel-size 2{micro_batch}")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_attention_dropout_depends_on_the_tensor_parallel_size_alone(row: Row) -> None:
    expected = with_tensor_parallel_ranks(row)[0]
    found = run_on_ranks(row.ranks, trained, f"{RUN} {MODELS[MODEL]} {row.flags}")
    assert differences(found, expected, row) == []
    assert expected.losses != pytest.approx(one_process(MODEL).losses, rel=1e-4), "dropout is on, heads draw apart"
