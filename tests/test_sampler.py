"""--sample-prompt: what is wrong with it is found before the model is built."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from megalm.commands.sampler import build_sampler
from megalm.config.merging.load import load_config
from megalm.errors import ConfigError

FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --lr 1 --train-iters 1 "
    "--mock-data"
)


BERT = ["--model-family", "bert", "--objective", "masked", "--bert-no-binary-head"]
T5 = [
    *("--model-family", "t5", "--objective", "span", "--relu", "--position-embedding-type", "relative"),
    *("--normalization", "RMSNorm", "--disable-bias-linear", "--decoder-seq-length", "5"),
    *("--mean-noise-span-length", "1", "--sample-prompt"),
]


class Letters:
    """A token a letter; special ones are control characters."""

    special_ids: ClassVar = {"eod": 1, "pad": 2, "mask": 3, "cls": 4, "sep": 5, "extra_id_0": 6}

    def special(self, name: str) -> int | None:
        return self.special_ids.get(name)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Engine:
    """A model whose likeliest tokens are known; it notes what it is shown."""

    device = torch.device("cpu")

    def __init__(self, tokens: str) -> None:
        self.tokens, self.shown = tokens, []

    def logits_at(self, fields: dict[str, torch.Tensor], places: list[int]) -> torch.Tensor:
        self.shown.append(fields)
        said, self.tokens = self.tokens[: len(places)], self.tokens[len(places) :]
        return F.one_hot(torch.tensor([[ord(letter) for letter in said]]), 128).float()


def sampler(*flags: str, tokenizer=None):
    return build_sampler(load_config([*FLAGS.split(), *flags]), tokenizer)


def test_nothing_is_sampled_unless_asked_for() -> None:
    assert sampler(tokenizer=Letters()) is None


def test_the_continuation_ends_with_the_sequence() -> None:
    assert sampler("--sample-prompt", "abc", tokenizer=Letters()).count == 5
    assert sampler("--sample-prompt", "abc", "--sample-tokens", "2", tokenizer=Letters()).count == 2


def test_an_encoder_fills_in_all_masks_at_once() -> None:
    engine = Engine("xy")
    found = sampler(*BERT, "--sample-prompt", "a[MASK]<mask>b", tokenizer=Letters())
    assert found.text(engine) == "axyb"
    (fields,) = engine.shown
    assert fields["tokens"].tolist() == [[4, ord("a"), 3, 3, ord("b"), 5]]
    assert fields["padding_mask"].all()
    assert found.text(engine, stopped=lambda: True) is None


def test_an_encoder_needs_a_mask() -> None:
    tokenizer = Letters()
    tokenizer.special_ids = {"cls": 4, "sep": 5}
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        sampler(*BERT, "--sample-prompt", "a[MASK]", tokenizer=tokenizer)


def test_an_encoder_decoder_writes_what_its_decoder_has_room_for() -> None:
    engine = Engine("\x06xyz?")
    assert sampler(*T5, "ab", tokenizer=Letters()).text(engine) == "<extra_id_0> xyz?"
    assert [fields["tokens"].tolist() for fields in engine.shown] == [[[ord("a"), ord("b"), 1]]] * 5
    assert engine.shown[-1]["decoder_tokens"].tolist() == [[2, 6, *map(ord, "xyz")]]
    assert sampler(*T5, "ab", tokenizer=Letters()).text(Engine("x\x01")) == "x"


@pytest.mark.parametrize(
    ("flags", "prompt", "expected"),
    [
        (BERT, "abc", "has no mask that could be filled in"),
        (BERT, "abcdef[MASK]", "has 9 tokens with those around it; it must have 3 to seq_length=8"),
        (T5[:-1], "abcdefgh", "has 9 tokens with those around it; it must have 2 to seq_length=8"),
        (T5[:-1], "", "has 1 tokens"),
    ],
)
def test_prompts_that_do_not_fit_the_family(flags: list[str], prompt: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        sampler(*flags, "--sample-prompt", prompt, tokenizer=Letters())


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
