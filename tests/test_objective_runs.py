"""Runs of each kind of objective, stopped and gone on: bit for bit, and what is reported of them."""

from pathlib import Path

import pytest
from whole_runs import trained

from megalm.testing.small_runs import metrics
from megalm.testing.spawner import run_on_ranks

RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 32 --vocab-size 377 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 4 --eval-iters 2 --eval-interval 2 --lr 0.02 --mock-data --num-workers 0 "
    "--log-interval 1 --sinks jsonl --hidden-dropout 0.1 "
)
T5 = (
    "--model-family t5 --position-embedding-type relative --normalization RMSNorm --disable-bias-linear "
    "--ul2-denoisers R:0.2:2,S:0.25,X:0.5:2 "
)
SPAN = T5.partition("--ul2")[0]
OBJECTIVES = {
    "mixture": "--objective-mixture causal:0.5,fim:0.25,prefix:0.25 --tokenizer-type ByteLevelTokenizer "
    "--vocab-extra-ids 120",
    "span": f"{SPAN} --objective span",
    "ul2": f"{T5} --objective ul2",
    "ul2 of decoders": "--objective ul2 --ul2-denoisers R:0.2:2,S:0.25,X:0.5:2",
    "span and ul2": f"{T5} --objective-mixture span:1,ul2:1 --decoder-seq-length 30",
}


def story(folder: str, flags: str) -> list[str]:
    """What ended each of the runs: one at once, and one in two parts."""
    return [
        trained(f"{RUN} {flags} --save {folder}/whole"),
        trained(f"{RUN} {flags} --save {folder}/stopped --exit-interval 2"),
        trained(f"{RUN} {flags} --save {folder}/stopped"),
    ]


@pytest.mark.parametrize(
    "name", [name if name == "mixture" else pytest.param(name, marks=pytest.mark.long) for name in OBJECTIVES]
)
def test_a_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert run_on_ranks(1, story, str(tmp_path), OBJECTIVES[name]) == [[""] * 3]
    whole, stopped = (metrics(tmp_path / folder) for folder in ("whole", "stopped"))
    timed = ("iteration_time_s", "tokens_per_s", "tflops_per_rank", "data_wait_s", "memory_bytes", "time")

    def values(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{key: value for key, value in row.items() if key not in timed} for row in rows]

    assert len([row for row in whole if "loss" in row]) == 4
    assert values(stopped) == values(whole)
    if "mixture" not in OBJECTIVES[name]:
        return
    members = [part.partition(":")[0] for part in OBJECTIVES[name].partition("mixture ")[2].split()[0].split(",")]
    for row in (row for row in whole if "validation_loss" in row):
        own = [row[f"validation_{member}_loss"] for member in members]
        assert len(set(own)) == len(own)
        assert min(own) < row["validation_loss"] < max(own), "the mean of theirs, by their tokens"
