"""Masked language modelling: what is hidden, how often, behind what; and the arrays that the model gets."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config import load_config
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers.base import starts_of_words
from megalm.data.tokenizers.plain import ByteLevelTokenizer
from megalm.errors import ConfigError
from megalm.objectives import build_objective
from megalm.objectives.masked import MaskedObjective

MASK, CLS, SEP, EOD, PAD, VOCAB = 1, 2, 3, 0, 4, 64
FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 64 --model-family bert --objective masked"
)


def objective(**changes):
    ids = {"mask": MASK, "cls": CLS, "sep": SEP, "eod": EOD, "pad": PAD, "special": (EOD, MASK, CLS, SEP, PAD)}
    return MaskedObjective(seed=5, vocab_size=VOCAB, **ids, **changes)


def sample(number, *tokens):
    return Sample(number, 0, np.asarray(tokens, dtype=np.int64))


def texts(count, length, seed=0):
    tokens = np.random.default_rng(seed).integers(5, VOCAB, (count, length))
    return [Sample(number, 0, row) for number, row in enumerate(tokens)]


def test_a_row_is_a_text_between_its_tokens_and_its_padding():
    row = objective(mask_prob=0.5)(sample(1, 10, 11, EOD, 12, -1, -1))
    assert row["labels"].tolist() == [CLS, 10, 11, EOD, 12, SEP, PAD, PAD]
    assert row["cu_seqlens"].tolist() == [0, 6, 8, 8, 8, 8, 8, 8, 8]
    hidden = row["loss_mask"].astype(bool)
    assert not hidden[[0, 3, 5, 6, 7]].any(), "special tokens and padding are never hidden"
    assert (row["tokens"][~hidden] == row["labels"][~hidden]).all()
    fields = objective().fields(8)
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in fields.items()
    }


def test_documents_end_with_eod():
    row = objective(reset_attention_mask=True, reset_position_ids=True)(sample(0, 10, EOD, 11, 12, -1))
    assert row["cu_seqlens"].tolist() == [0, 3, 6, 7, 7, 7, 7, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_sample_of_padding_counts_nothing():
    for is_pair in (False, True):
        row = objective(is_pair=is_pair)(sample(0, -1, -1, -1))
        assert not row["loss_mask"].any()
        assert row.get("is_random", -1) == -1


def test_rates_are_those_that_are_asked_for():
    """In rows so short that rounding would show: 11 x 0.15 is no whole number."""
    chosen = objective(mask_prob=0.15)
    rows = [chosen(text) for text in texts(3_000, 11)]
    hidden, shown, labels = (np.stack([row[name] for row in rows]) for name in ("loss_mask", "tokens", "labels"))
    hidden = hidden.astype(bool)
    assert hidden.mean() * 13 / 11 == pytest.approx(0.15, abs=0.002)
    assert set(hidden.sum(1).tolist()) == {1, 2}  # 1.65 in the mean
    is_mask, is_same = shown[hidden] == MASK, shown[hidden] == labels[hidden]
    assert is_mask.mean() == pytest.approx(0.8, abs=0.02)
    assert is_same.mean() == pytest.approx(0.1 + 0.1 / 59, abs=0.015)
    others = shown[hidden][~is_mask & ~is_same]
    assert set(others.tolist()) == set(range(5, VOCAB)), "any ordinary token, and no special one"


def test_whole_words_are_hidden_at_the_same_rate():
    starts = [number % 3 != 0 for number in range(VOCAB)]
    whole, rows = objective(mask_prob=0.3).with_words(starts), texts(1_200, 30, seed=1)
    hidden = np.stack([whole(text)["loss_mask"][1:-1] for text in rows]).astype(bool)
    assert hidden.mean() == pytest.approx(0.3, abs=0.005)
    inside = np.stack([text.tokens % 3 == 0 for text in rows])
    assert (hidden[:, 1:] == hidden[:, :-1])[inside[:, 1:]].all()


def test_pairs_are_exchanged_half_of_the_time():
    chosen = objective(is_pair=True, short_seq_prob=0.2)
    rows = [chosen(text) for text in texts(1_500, 21)]
    assert np.mean([row["is_random"] for row in rows]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([row["cu_seqlens"][1] < 24 for row in rows]) == pytest.approx(0.2, abs=0.03)
    for text, row in zip(texts(40, 21), rows, strict=False):
        length = int(row["cu_seqlens"][1])
        labels, second = row["labels"][:length], row["token_types"][:length] == 1
        first, rest = labels[~second][1:-1], labels[second][:-1]
        parts = [rest, first] if row["is_random"] else [first, rest]
        assert np.concatenate(parts).tolist() == text.tokens[: length - 3].tolist()
        assert (labels[0], labels[~second][-1], labels[-1]) == (CLS, SEP, SEP)
        assert not row["token_types"][length:].any()


@given(st.integers(0, 40), st.integers(0, 10), st.booleans(), st.floats(0.01, 0.99), st.integers(0, 10**12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_sample_is_a_row_that_depends_on_its_number_alone(length, padding, is_pair, rate, number):
    chosen = objective(mask_prob=rate, is_pair=is_pair, short_seq_prob=0.5)
    tokens = [*np.random.default_rng(length).integers(0, VOCAB, length), *[-1] * padding]
    rows = [each(sample(number, *tokens)) for each in (chosen, pickle.loads(pickle.dumps(chosen)))]
    T = len(tokens) + (3 if is_pair else 2)
    assert rows[0]["tokens"].shape == (T,)
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert rows[0]["tokens"].min() >= 0
    assert rows[0]["tokens"].max() < VOCAB


class Words:
    """A tokenizer with these special tokens."""

    def __init__(self, **special):
        self._special = special

    def special(self, name):
        return self._special.get(name)

    def word_starts(self):
        return None


def test_tokens_stand_in_for_others_and_missing_ones_are_named():
    config = load_config(FLAGS.split())
    found = build_objective(config, Words(mask=9, bos=1, eos=2))
    assert (found.mask, found.cls, found.sep, found.special, found.is_pair) == (9, 1, 2, (1, 2, 9), True)
    with pytest.raises(ConfigError, match="a tokenizer with a mask token and a cls token"):
        build_objective(config, Words(eod=0))
    with pytest.raises(ConfigError, match="a mask token and a cls token and a sep token"):
        build_objective(config, None)
    words = load_config([*FLAGS.split(), "--whole-word-masking"])
    with pytest.raises(ConfigError, match="Words does not tell which tokens begin a word"):
        build_objective(words, Words(mask=9, bos=1, eos=2))


@pytest.mark.parametrize(
    ("tokens", "prefix", "expected"),
    [
        (["[CLS]", "play", "##ing", "now"], "##", [True, True, False, True]),
        (["<s>", "\u2581play", "ing", "\u2581now"], None, [False, True, False, True]),
        (["play", "ing", "\u0120now", "\u010aThen"], None, [False, False, True, True]),
        (["a", "b"], None, None),
    ],
)
def test_words_are_known_from_the_vocabulary(tokens, prefix, expected):
    assert starts_of_words(tokens, prefix) == expected


def test_bytes_know_words_by_blanks():
    assert [number for number, starts in enumerate(ByteLevelTokenizer().word_starts()) if starts] == [9, 10, 13, 32]
