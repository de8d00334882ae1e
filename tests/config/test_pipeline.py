"""Rules of the pipeline schedules: found before a process starts, with value, rule and fix."""

import pytest

from megalm.config.rules.layout import check_layout
from megalm.config.rules.pipeline import SCHEDULES, chunks_per_rank, num_stages, schedule_name
from megalm.errors import LayoutError

PP2 = "--num-layers 8 --pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pipeline-schedule zbv", "pipeline_schedule=zbv needs a pipeline"),
        ("--virtual-pipeline-size 2", "virtual_pipeline_size=2 needs a pipeline"),
        ("--pipeline-layout 1,1", "pipeline_layout=1,1 needs a pipeline"),
        (f"{PP2} --pipeline-schedule zbv --virtual-pipeline-size 3", "needs exactly 2 stages a rank, not 3"),
        (f"{PP2} --pipeline-schedule gpipe --virtual-pipeline-size 2", "needs exactly 1 stages a rank, not 2"),
        (f"{PP2} --pipeline-schedule interleaved-1f1b --virtual-pipeline-size 1", "needs at least 2 stages a rank"),
        (
            f"{PP2} --virtual-pipeline-size 5",
            "10 stages need a layer each, but num_layers=8; use at most 1 pipeline ranks, or --virtual-pipeline-size 4 "
            "or less",
        ),
        ("--pipeline-model-parallel-size 4", "need a layer each, but num_layers=2; use at most 2 pipeline ranks"),
        (f"{PP2} --num-layers-per-virtual-pipeline-stage 3", "must be a multiple of"),
        (f"{PP2} --num-layers-per-virtual-pipeline-stage 2 --virtual-pipeline-size 2", "both say how many stages"),
        (f"{PP2} --pipeline-layout 4,x", "must be numbers of layers with commas between"),
        (f"{PP2} --pipeline-layout 4,-1,5", "must be numbers of layers with commas between"),
        (f"{PP2} --pipeline-layout 4,2,2", "has 3 stages; 2 pipeline ranks x 1 stages each are 2"),
        (f"{PP2} --pipeline-layout 4,3", "has 7 layers, the model num_layers=8"),
        (f"{PP2} --pipeline-schedule zbv --pipeline-layout 4,0,2,2", "an inner stage without layers"),
        (f"{PP2} --pipeline-schedule zbv --zero-stage 3", "gpipe or 1f1b or interleaved-1f1b"),
    ],
)
def test_pipelines_that_cannot_be_built(problem, flags, expected):
    assert expected in problem(*flags.split())


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("--pipeline-schedule dualpipev --micro-batch-size 4 --global-batch-size 12", 2, "each of its 4 stages"),
        ("--pipeline-schedule interleaved-1f1b --micro-batch-size 4 --global-batch-size 20", 2, "such as 4 or 6"),
        ("--pipeline-schedule interleaved-zero-bubble --micro-batch-size 4 --global-batch-size 20", 2, "2 rounds"),
    ],
)
def test_micro_batches_that_a_schedule_cannot_do(load, flags, ranks, expected):
    with pytest.raises(LayoutError, match=expected):
        check_layout(load(*PP2.split(), *flags.split()), ranks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_takes_four_micro_batches_on_two_ranks(load, name):
    config = load(*PP2.split(), "--pipeline-schedule", name, *["--micro-batch-size", "4", "--global-batch-size", "16"])
    assert check_layout(config, 2) == 1


def test_the_schedule_follows_from_the_chunks(load):
    plain = load(*PP2.split()).parallel
    assert (schedule_name(plain), chunks_per_rank(plain, 8)) == ("1f1b", 1)
    several = load(*PP2.split(), "--num-layers-per-virtual-pipeline-stage", "2").parallel
    assert (schedule_name(several), chunks_per_rank(several, 8), num_stages(several, 8)) == ("interleaved-1f1b", 2, 4)
    megatron = load(*PP2.split(), "--num-virtual-stages-per-pipeline-rank", "4").parallel
    assert (schedule_name(megatron), num_stages(megatron, 8)) == ("interleaved-1f1b", 8)
