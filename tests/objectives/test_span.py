"""Span corruption: T5's lengths, nothing padded needlessly, every text to be had back from what is made of it."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.merging.load import load_config
from megalm.config.rules.completion import complete_model
from megalm.config.spans import Denoising, SequenceIds, SpanNoise
from megalm.data.samples.sample import Sample
from megalm.errors import ConfigError
from megalm.objectives import build_objective
from megalm.objectives.forms import EncoderDecoderForm
from megalm.objectives.span import SpanObjective

START, END = 1, 2
SENTINEL = 1000  # and downwards, as T5 has them
RUN = (
    "--model-family t5 --objective span --num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 900 "
    "--position-embedding-type relative --normalization RMSNorm --disable-bias-linear --train-iters 1 --lr 0.1 "
    "--micro-batch-size 1 --seq-length 512 "
)


def objective(encoder: int, density: float = 0.15, mean: float = 3.0, **changes: Any) -> SpanObjective:
    noise = SpanNoise(density=density, mean_length=mean)
    text = noise.text_tokens(encoder)
    form = EncoderDecoderForm(encoder_length=encoder, decoder_length=noise.lengths(text)[1])
    options = {"form": form, "seed": 7} | changes
    sentinels = tuple(range(SENTINEL, SENTINEL - noise.counts(text)[1], -1))
    ids = SequenceIds(start=START, end=END, pad=0)
    return SpanObjective(kind=Denoising(noises=(noise,)), sentinels=sentinels, ids=ids, **options)


def joined(row: dict[str, Any], sentinels: tuple[int, ...]) -> list[int]:
    """The text again: each sentinel that the encoder reads stands for what the decoder writes after it."""
    read = row["tokens"][row["padding_mask"]].tolist()
    written = row["labels"][row["loss_mask"] > 0].tolist()
    assert read.pop() == written.pop() == END
    spans: dict[int, list[int]] = {}
    for token in written:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == [token for token in read if token in sentinels] == list(sentinels[: len(spans)])
    return [token for part in read for token in spans.get(part, [part])]


@pytest.mark.parametrize(
    ("encoder", "text", "decoder"), [(512, 568, 114), (1024, 1137, 229), (2048, 2274, 456), (256, 284, 58)]
)
def test_lengths_are_those_of_t5(encoder: int, text: int, decoder: int) -> None:
    noise = SpanNoise(density=0.15, mean_length=3.0)
    assert noise.text_tokens(encoder) == text
    assert noise.lengths(text) == (encoder, decoder)
    assert noise.text_tokens(encoder, decoder - 1) < text
    assert objective(encoder).sample_tokens(encoder) == text


@given(st.data())
@settings(deadline=None)
def test_a_whole_text_fills_both_and_comes_back(data: st.DataObject) -> None:
    density, mean = data.draw(st.floats(0.02, 0.6)), data.draw(st.floats(1.0, 6.0))
    encoder = data.draw(st.integers(8, 200))
    own = objective(encoder, density, mean)
    length = own.sample_tokens(encoder)
    text = np.random.default_rng(0).integers(3, 900, length)
    row = own(Sample(data.draw(st.integers(0, 10**9)), 0, text))
    assert row["padding_mask"].all() or own.kind.noises[0].lengths(length)[0] < encoder
    assert row["loss_mask"].all()
    assert joined(row, own.sentinels) == text.tolist()
    assert row["decoder_tokens"].tolist() == [START, *row["labels"][:-1]]
    fields = {name: ((*array.shape,), array.dtype) for name, array in row.items()}
    assert fields == {name: (f.shape, np.dtype(f.dtype)) for name, f in own.fields(encoder).items()}


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_a_shorter_text_is_followed_by_padding(tokens: int) -> None:
    own = objective(64)
    text = np.full(own.sample_tokens(64), -1)
    text[:tokens] = np.arange(10, 10 + tokens)
    row = own(Sample(3, 0, text))
    assert joined(row, own.sentinels) == text[:tokens].tolist()
    assert row["tokens"].min() >= 0
    assert not row["padding_mask"].all()
    assert row["loss_mask"].sum() == own.kind.noises[0].lengths(tokens)[1]


def test_spans_follow_from_seed_and_number_alone() -> None:
    own, text = objective(64), np.arange(3, 3 + objective(64).sample_tokens(64))
    first = own(Sample(5, 0, text))["tokens"].tolist()
    assert pickle.loads(pickle.dumps(own))(Sample(5, 1, text))["tokens"].tolist() == first
    assert own(Sample(6, 0, text))["tokens"].tolist() != first
    assert objective(64, seed=8)(Sample(5, 0, text))["tokens"].tolist() != first


def test_noise_and_spans_have_the_shares_that_are_asked_for() -> None:
    """Every place is noise as often, but for the first tokens, which stay; spans are of the mean length."""
    own = objective(512)
    text = np.arange(3, 3 + 568)
    noise = np.zeros(568)
    for number in range(400):
        row = own(Sample(number, 0, text))
        noise[np.setdiff1d(text, row["tokens"]) - 3] += 1 / 400
    assert noise.mean() == pytest.approx(0.15, abs=0.002)
    assert noise[50:-50].std() < 0.03
    assert len(own.sentinels) == 28  # 85 noise tokens in spans of 3


def test_sentinels_come_from_the_tokenizer_or_the_error_says_how() -> None:
    class Tokenizer:
        def __init__(self, sentinels: int) -> None:
            self.ids = {"pad": 0, "eos": 1, "eod": 4} | {f"extra_id_{n}": 800 + n for n in range(sentinels)}

        def special(self, name: str) -> int | None:
            return self.ids.get(name)

    config = load_config((RUN + "--data-path nowhere --tokenizer-model nothing").split())
    config = config.model_copy(update={"model": complete_model(config, None)})
    assert config.model.decoder_seq_length == 114
    own = build_objective(config, Tokenizer(100))
    assert isinstance(own, SpanObjective)
    assert own.sentinels == tuple(range(800, 828))
    assert own.ids == SequenceIds(start=0, end=1, pad=0)
    with pytest.raises(ConfigError, match=r"needs 28 sentinels <extra_id_0>, ... for seq_length=512, and there are 27; "
                       "give --vocab-extra-ids 100"):  # fmt: skip
        build_objective(config, Tokenizer(27))
    with pytest.raises(ConfigError, match="needs a tokenizer with an end-of-text token"):
        SequenceIds.of({"pad": 0})
