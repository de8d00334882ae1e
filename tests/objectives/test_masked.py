"""Masked language modelling: what is hidden, how often, behind what; and the arrays that the model gets."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.merging.load import load_config
from megalm.config.spans import MaskedRuns
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.samples.blended_dataset import BlendedDataset
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.samples.sample import Sample
from megalm.data.samples.source import Sampling, Source
from megalm.data.tokenizers.base import starts_of_words
from megalm.data.tokenizers.plain import ByteLevelTokenizer
from megalm.errors import ConfigError, DataError
from megalm.objectives import build_objective
from megalm.objectives.masked import MaskedObjective, hidden_runs

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


RUNS = {
    "n-grams": (MaskedRuns(longest=3), 18 / 11),
    "longer n-grams": (MaskedRuns(longest=3, shape="longer"), 1 * 2 / 11 + 2 * 3 / 11 + 3 * 6 / 11),
    "SpanBERT": (MaskedRuns(longest=10, shape="geometric"), 3.797),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.long)])
def test_runs_have_their_mean_length_at_the_same_rate(name, count):
    """The bounds of 100,000 samples, and of fewer ones what four standard deviations are."""
    runs, mean = RUNS[name]
    assert runs.mean == pytest.approx(mean, abs=0.001)
    draw, words, hidden, found = np.random.default_rng(3), 126, 0, []
    for _ in range(count):
        run_of_word = hidden_runs(words, 0.15, runs, draw)
        lengths = np.bincount(run_of_word[run_of_word >= 0])
        assert (np.diff(run_of_word)[(run_of_word[1:] >= 0) & (run_of_word[:-1] >= 0)] == 0).all(), "a word between"
        hidden += int(lengths.sum())
        found.append(lengths)
    wide = (100_000 / count) ** 0.5 / 6
    lengths = np.concatenate(found)
    assert hidden / (count * words) == pytest.approx(0.15, abs=0.002 * max(wide, 1))
    assert lengths.mean() == pytest.approx(mean, rel=0.01 * max(wide, 1))
    shares = np.bincount(lengths, minlength=runs.longest + 1)[1:] / len(lengths)
    assert shares == pytest.approx(np.array(runs.probabilities), abs=0.01 * max(wide, 1))


def test_runs_are_of_whole_words_and_a_spans_tokens_share_their_fate():
    starts = [number % 3 != 0 for number in range(VOCAB)]
    chosen = objective(mask_prob=0.3, runs=MaskedRuns(longest=10, shape="geometric")).with_words(starts)
    kinds = set()
    for text in texts(300, 40, seed=2):
        row = chosen(text)
        hidden = np.flatnonzero(row["loss_mask"])
        inside = text.tokens % 3 == 0
        mask = row["loss_mask"][1:-1].astype(bool)
        assert (mask[1:] == mask[:-1])[inside[1:]].all()
        for run in np.split(hidden, np.flatnonzero(np.diff(hidden) > 1) + 1) if len(hidden) else ():
            is_mask, is_same = row["tokens"][run] == MASK, row["tokens"][run] == row["labels"][run]
            assert is_mask.all() or not is_mask.any()
            kinds.add("mask" if is_mask.all() else "same" if is_same.all() else "other")
    assert kinds == {"mask", "same", "other"}


def test_a_row_too_short_for_its_runs_hides_what_fits():
    for words in range(6):
        for number in range(50):
            found = hidden_runs(words, 0.6, MaskedRuns(longest=10, shape="geometric"), np.random.default_rng(number))
            assert len(found) == words


def test_the_next_text_is_of_another_document(tmp_path):
    """In both orders of samples, of documents of one sequence and of several."""
    documents = [[10 * number + 5] * (3 + number % 4) + [EOD] for number in range(5)]
    for order, count in itertools.product(("shuffle", "stream"), (1, 2)):
        sequences = [part for document in documents for part in (document[:count], document[count:])]
        with IndexedDatasetBuilder(tmp_path / f"{order}{count}", "uint16") as builder:
            for document in documents:
                builder.add_document(document, [count, len(document) - count])
            builder.finalize()
        indexed = IndexedDataset(tmp_path / f"{order}{count}")
        source = Source(indexed, range(10), Sampling(seq_length=9, extra_tokens=0, seed=1, order=order))
        dataset = BlendedDataset([source], None, 24)
        chosen = objective(is_pair=True, next_text=True).with_documents(dataset)
        numbers = range(24)
        rows = {number: chosen(dataset[number]) for number in numbers}
        for number in reversed(numbers):
            row = rows[number]
            again = chosen(dataset[number])
            assert all(np.array_equal(row[name], again[name]) for name in row)
            length, second = int(row["cu_seqlens"][1]), row["token_types"] == 1
            first, rest = row["labels"][:length][~second[:length]][1:-1], row["labels"][second][:-1]
            own, tokens = set(dataset[number].tokens.tolist()) - {EOD}, rest.tolist()
            assert first.tolist() == dataset[number].tokens[: len(first)].tolist()
            assert first[-1] != EOD
            if row["is_random"] == 1:
                assert not own & set(tokens)
                assert any(tokens == piece[start : start + len(tokens)] for piece in sequences for start in range(7))
            else:
                assert tokens == dataset[number].tokens[len(first) :].tolist()
        assert 3 <= sum(int(row["is_random"] == 1) for row in rows.values()) <= 21
    with pytest.raises(DataError, match=r"no other document .* use --bert-sentence-head sop"):
        Source(indexed, range(2), Sampling(seq_length=2, extra_tokens=0, seed=1)).text([0], 3, np.random.default_rng(0))


@pytest.mark.long
def test_100_000_samples_have_the_rates_that_are_asked_for():
    chosen = objective(is_pair=True, next_text=True).with_documents(MockDataset(VOCAB, 61, 1, 1, extra_tokens=0))
    counts, draw = np.zeros(6), np.random.default_rng(7)
    for number in range(100_000):
        row = chosen(Sample(number, 0, draw.integers(5, VOCAB, 61)))
        hidden = row["loss_mask"].astype(bool)
        ordinary = ~np.isin(row["labels"], (EOD, MASK, CLS, SEP, PAD))  # the next text of other documents has all ids
        shown, labels = row["tokens"][hidden], row["labels"][hidden]
        counts += [
            ordinary.sum(),
            hidden.sum(),
            (shown == MASK).sum(),
            (shown == labels).sum(),
            row["is_random"] == 1,
            1,
        ]
    tokens, hidden, masks, same, is_random, rows = counts
    assert hidden / tokens == pytest.approx(0.15, abs=0.002)
    assert masks / hidden == pytest.approx(0.8, abs=0.005)
    assert same / hidden == pytest.approx(0.1 + 0.1 / 59, abs=0.005)
    assert is_random / rows == pytest.approx(0.5, abs=0.005)


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
