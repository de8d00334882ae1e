"""What objectives make of 100,000 samples has the rates that are asked for; samples are the same however they come."""

import numpy as np
import pytest
from loaded_rows import numbers_of_equal_rows

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.objectives import build_objective
from megalm.objectives.base import UsesDocuments

SAMPLES, LENGTH = 100_000, 64
RUN = (
    f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length {LENGTH} --micro-batch-size 2 --lr 0.1 "
    "--train-iters 1 --vocab-size 700 --mock-data --tokenizer-type ByteLevelTokenizer --vocab-extra-ids 100 "
)
T5 = "--model-family t5 --position-embedding-type relative --normalization RMSNorm --disable-bias-linear "
DENOISERS = "--ul2-denoisers R:0.15:2,S:0.25,X:0.5:3 "
OBJECTIVES = {
    "causal, fim and prefix": "--objective-mixture causal:0.5,fim:0.3,prefix:0.2 --reset-attention-mask",
    "masked, next sentence": "--model-family bert --objective masked --bert-sentence-head nsp --masking-max-ngram 3",
    "masked, sentence order": "--model-family bert --objective masked --whole-word-masking",
    "rtd": "--model-family electra --objective rtd --rtd-generator-size 1 --masking-use-geometric-distribution",
    "span": f"{T5} --objective span",
    "ul2": f"{T5} --objective ul2 {DENOISERS}",
    "ul2 of decoders": f"--objective ul2 {DENOISERS}",
    "span and ul2": f"{T5} --objective-mixture span:1,ul2:2 --decoder-seq-length 60 {DENOISERS}",
}
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=100))


def objective(flags):
    return build_objective(load_config((RUN + flags).split()), BYTES)


def counted(flags):
    """The statistics of rows of random bytes."""
    chosen, draw, found = objective(flags), np.random.default_rng(5), {}
    length, size = chosen.sample_tokens(LENGTH), 1000
    for first in range(0, SAMPLES, size):
        texts = draw.integers(0, 250, (size, length))
        rows = [chosen(Sample(first + number, 0, text)) for number, text in enumerate(texts)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        for name, (value, count) in chosen.statistics(batch).items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + value, before[1] + count)
    return chosen, {name: value / count for name, (value, count) in found.items()}


@pytest.mark.long
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.3, 2.5), (0.5, 8.0)])
def test_noise_of_spans(density, mean):
    """Of a text of N tokens round(N x density) are noise, in round(noise / mean) spans."""
    chosen, found = counted(f"{T5} --objective span --noise-density {density} --mean-noise-span-length {mean}")
    tokens = chosen.sample_tokens(LENGTH)
    noise = round(tokens * density)
    assert found["mask_rate"] == pytest.approx(noise / tokens, abs=1e-9)
    assert found["mask_rate"] == pytest.approx(density, abs=0.002 + 0.5 / tokens)
    assert found["mean_span"] == pytest.approx(noise / round(noise / mean), rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("family", [T5, ""])
def test_denoisers_come_as_often_as_each_other(family):
    _, found = counted(f"{family} --objective ul2 {DENOISERS}")
    assert [found[f"share_{mode}"] for mode in "rsx"] == pytest.approx([1 / 3] * 3, abs=0.005)


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_documents_are_cut_as_often_as_is_asked_for(rate):
    _, found = counted(f"--objective fim --fim-rate {rate}")
    assert found["fim_rate"] == pytest.approx(rate, abs=0.005)


@pytest.mark.long
def test_prefixes_are_of_every_length():
    _, found = counted("--objective prefix")
    assert found["prefix_share"] == pytest.approx(0.5, abs=0.002)


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_are_the_same_for_all_workers_ranks_orders_and_after_a_resume(name):
    chosen, count = objective(OBJECTIVES[name]), 32
    shared = chosen.shared_tokens
    data = MockDataset(250, chosen.sample_tokens(LENGTH) - shared, 1, count, extra_tokens=shared)
    if isinstance(chosen, UsesDocuments) and chosen.needs_documents:
        chosen = chosen.with_documents(data)
    expected = [chosen(data[number]) for number in reversed(range(count))][::-1]
    for workers, size, start in ((0, 1, 0), (1, 2, 0), (2, 1, 8), (8, 1, 0), (8, 2, 16), (0, 4, 8), (0, 8, 0)):
        seen = numbers_of_equal_rows(data, chosen, expected, LENGTH, workers=workers, size=size, start=start)
        assert sorted(seen) == list(range(start, count))
