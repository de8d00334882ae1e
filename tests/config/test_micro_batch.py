"""Without --micro-batch-size it follows from the global batch, the ranks and the schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.deepspeed.write import engine_json
from megalm.config.merging.dump import dump_config
from megalm.config.merging.load import load_config
from megalm.config.rules.batch import with_micro_batch_size
from megalm.config.rules.layout import check_layout
from megalm.config.rules.pipeline import SCHEDULES, num_stages
from megalm.errors import ConfigError, LayoutError

RUN = "--num-layers 8 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --lr 1 --train-iters 1 --mock-data"


def fitted(flags: str, ranks: int):
    """The batch section of a run on so many ranks."""
    config = load_config(f"{RUN} {flags}".split())
    return with_micro_batch_size(config, check_layout(config, ranks)).batch


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("", 1, 16),
        ("", 2, 8),
        ("", 16, 1),
        ("--gradient-accumulation-steps 4", 2, 2),
        ("--tensor-model-parallel-size 2", 4, 8),
        ("--pipeline-model-parallel-size 2", 2, 8),
        ("--pipeline-model-parallel-size 2 --pipeline-schedule zbv", 4, 2),
        ("--pipeline-model-parallel-size 2 --pipeline-schedule dualpipev", 4, 2),
        ("--pipeline-model-parallel-size 4 --pipeline-schedule interleaved-1f1b", 8, 1),
        # too few samples for eight stages: as many micro-batches as can be
        ("--pipeline-model-parallel-size 4 --pipeline-schedule zbv", 16, 1),
        ("--micro-batch-size 4", 2, 4),
    ],
)
def test_the_size_that_follows_from_a_global_batch_of_16(flags, ranks, expected):
    assert fitted(f"--global-batch-size 16 {flags}", ranks).micro_batch_size == expected


def test_no_batch_size_at_all_is_an_error():
    with pytest.raises(ConfigError, match="micro_batch_size is missing; give --micro-batch-size N, or --global"):
        load_config(RUN.split())


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("--global-batch-size 10", 4, r"global_batch_size=10 = micro_batch_size \? x dp 4 x .* use 8 or 12"),
        ("--global-batch-size 12 --gradient-accumulation-steps 4", 2, "accumulation 4 has no solution.* use 8 or 16"),
        (
            "--global-batch-size 4 --pipeline-model-parallel-size 2 --pipeline-schedule dualpipev",
            4,
            "with 2 micro-batches a step and rank needs at least one for each of its 4 stages; change --global-batch",
        ),
        ("--global-batch-size 8 --train-iters none --train-samples 7", 2, "train_samples=7 is less than the 8 samples"),
        ("--global-batch-size 16 --micro-batch-size 8", 4, "use 32, or leave --micro-batch-size out: it follows"),
    ],
)
def test_batches_that_no_size_splits(flags, ranks, expected):
    with pytest.raises((ConfigError, LayoutError), match=expected):
        fitted(flags, ranks)


@given(
    share=st.integers(1, 48), dp=st.integers(1, 4), pp=st.sampled_from([1, 2, 4]), name=st.sampled_from([*SCHEDULES])
)
def test_the_size_splits_the_batch_and_fills_the_pipeline_where_it_can(share, dp, pp, name):
    schedule = f" --pipeline-schedule {name}" if pp > 1 else ""
    words = f"{RUN} --global-batch-size {share * dp} --pipeline-model-parallel-size {pp}{schedule}"
    config = load_config(words.split())
    try:
        check_layout(config, dp * pp)
    except LayoutError:  # even one sample a micro-batch is not enough
        assert (name == "dualpipev" and share < 2 * pp) or name.startswith("interleaved")
        return
    batch = with_micro_batch_size(config, dp).batch
    assert batch.micro_size * batch.accumulation(dp) * dp == share * dp
    if pp > 1 and share % num_stages(config.parallel, 8) == 0:
        assert batch.accumulation(dp) >= num_stages(config.parallel, 8)


def test_the_engine_gets_the_size_and_the_dump_leaves_it_open():
    config = load_config(f"{RUN} --global-batch-size 16".split())
    assert engine_json(config, 2)["train_micro_batch_size_per_gpu"] == 8
    assert "micro_batch_size: null" in dump_config(config)
