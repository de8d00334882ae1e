"""What a run with a teacher is refused for by its settings alone, and what Megatron's names of them mean."""

import pytest

from megalm.config.merging.load import load_config
from megalm.config.rules.loss import cross_entropy_impl
from megalm.errors import ConfigError

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 99 "
)
TAUGHT = "--teacher-load runs/teacher "


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"{TAUGHT} --logit-kl-temperature 0", "logit_kl_temperature=0"),
        (f"{TAUGHT} --logit-kl-temperature -1", "logit_kl_temperature=-1"),
        (f"{TAUGHT} --logit-kl-temperature nan", "logit_kl_temperature=nan"),
        (f"{TAUGHT} --logit-kl-topk 0", "logit_kl_topk=0"),
        (f"{TAUGHT} --logit-kl-topk 100", "logit_kl_topk=100 is more than vocab_size=99"),
        (f"{TAUGHT} --kd-loss-scale 0", "kd_loss_scale=0"),
        (f"{TAUGHT} --kd-loss-scale inf", "kd_loss_scale=inf"),
        (f"{TAUGHT} --pipeline-model-parallel-size 2", "the last stage would need the teacher's logits"),
        (f"{TAUGHT} --cross-entropy-fusion-impl linear", "holds no logits, which teacher_load compares"),
        (f"{TAUGHT} --save runs/teacher", "whose checkpoints are the student's"),
        ("--teacher-load runs/own/step_3 --save runs/own", "whose checkpoints are the student's"),
        (
            f"{TAUGHT} --segment-memory 8 --sampling consecutive --position-embedding-type rope",
            "does not go with segment_memory=8",
        ),
        (f"{TAUGHT} --model-family electra --objective rtd --rtd-generator-size 1", "has no distribution over tokens"),
        ("--logit-kl-temperature 2", "logit_kl_temperature=2.0 is for a teacher"),
        ("--logit-kl-topk 5", "logit_kl_topk=5 is for a teacher"),
        ("--kd-loss-scale 2", "kd_loss_scale=2.0 is for a teacher"),
        ("--skip-lm-loss", "skip_lm_loss=true is for a teacher"),
        ("--teacher-load=", "must be a path"),
        ("--kd", "a teacher comes with its own settings: --teacher-load"),
        ("--num-layers-teacher 4", "a teacher comes with its own settings: --teacher-load"),
    ],
)
def test_what_cannot_be_is_one_problem(flags: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config((RUN + flags).split())
    (problem,) = error.value.problems
    assert expected in problem


def test_names_of_the_peers() -> None:
    found = load_config((RUN + "--load-teacher t --kd-temp 2 --kd-beta-ce 0.5").split()).distillation
    assert (found.teacher_load, found.logit_kl_temperature, found.kd_loss_scale) == ("t", 2.0, 0.5)
    assert load_config((RUN + "--export-kd-teacher-load hf:t").split()).distillation.teacher_load == "hf:t"


def test_logits_that_are_compared_are_held() -> None:
    large = RUN.replace("--vocab-size 99", "--vocab-size 300000000")
    assert cross_entropy_impl(load_config(large.split())) == "linear"
    assert cross_entropy_impl(load_config((large + TAUGHT).split())) == "logits"
