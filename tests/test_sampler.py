"""--sample-prompt: what is wrong with it is found before the model is built."""

import pytest

from megalm.commands.generate import Sampler
from megalm.config.merging.load import load_config
from megalm.errors import ConfigError

FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --lr 1 --train-iters 1 "
    "--mock-data"
)


class Letters:
    """A token a letter."""

    eod = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def sampler(*flags: str, tokenizer=None):
    return Sampler.of(load_config([*FLAGS.split(), *flags]), tokenizer)


def test_nothing_is_sampled_unless_asked_for() -> None:
    assert sampler(tokenizer=Letters()) is None


def test_the_continuation_ends_with_the_sequence() -> None:
    assert sampler("--sample-prompt", "abc", tokenizer=Letters()).count == 5
    assert sampler("--sample-prompt", "abc", "--sample-tokens", "2", tokenizer=Letters()).count == 2


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "expected"),
    [
        ("abc", None, "sample_prompt needs a tokenizer"),
        ("abcdefgh", Letters(), "has 8 tokens; it must have at least 1 and less than seq_length=8"),
        ("", Letters(), "has 0 tokens"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt: str, tokenizer: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        sampler("--sample-prompt", prompt, tokenizer=tokenizer)
