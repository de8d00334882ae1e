"""Ranks that were not started alike end before anything is built, in one error; what they share is proved to be shared.

On real ranks, with differences that would break the collectives themselves.
"""

from pathlib import Path

import pytest

from megalm.testing import warm
from megalm.testing.processes import REPOSITORY
from megalm.testing.warm import OfRank

FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --lr 1e-3 "
    "--vocab-size 64 --mock-data --kernels-backend reference "
    "--eval-iters 0 --train-iters 2 --num-workers 0"
)
RUN = (REPOSITORY / "launch/pretrain_gpt.py", *FLAGS.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--zero-stage 3 --hidden-size 32", "hidden_size is 32 (--hidden-size) there, 16 (--hidden-size) here"),
        ("--tensor-model-parallel-size 2 --save RUN", "tensor_model_parallel_size is 2"),
        ("--num-attention-heads 3", "not rank 0: "),
    ],
)
def test_one_rank_with_other_settings_ends_the_job_before_it_is_built(flags: str, says: str, tmp_path: Path) -> None:
    words = flags.replace("RUN", str(tmp_path / "run")).split()
    done = warm.run(*RUN, ranks=2, of_rank={1: OfRank(flags=tuple(words))}, timeout=180)
    assert done.code == 2
    assert len(done.errors) == 1
    assert done.errors[0].startswith("error: rank 1 on ")
    assert says in done.errors[0]
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_each_rank_has_for_itself_is_refused_before_training(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    own = {rank: OfRank(cwd=tmp_path / folder) for rank, folder in enumerate(("first", "second"))}
    done = warm.run(*RUN, "--save", "run", ranks=2, of_rank=own, timeout=180)
    assert done.code == 4
    assert len(done.errors) == 1
    assert "--save run is not the same folder on " in done.errors[0]
    assert not list((tmp_path / "second").iterdir())
    assert [path.name for path in (tmp_path / "first" / "run").iterdir()] == []
