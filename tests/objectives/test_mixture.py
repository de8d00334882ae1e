"""Mixtures: exact shares by sample number, the members' own rows, and members that do not go together."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_rows import numbers_of_equal_rows

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.tokenizers import build_tokenizer
from megalm.errors import ConfigError
from megalm.objectives import build_objective
from megalm.objectives.build import OBJECTIVES
from megalm.objectives.mixture import MixtureObjective, Shares

RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 24 --micro-batch-size 2 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 300 "
)
THREE = "--objective-mixture causal:0.5,fim:0.3,prefix:0.2 "
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=20))


def mixture(flags=THREE):
    return build_objective(load_config((RUN + flags).split()), BYTES)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 2000))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_shares_are_exact(weights, count):
    names = {str(number): Fraction(weight, 50) for number, weight in enumerate(weights)}
    shares, total = Shares.of(names), sum(weights)
    owners = np.bincount([shares.owner(number) for number in range(count)], minlength=len(weights))
    for owner, weight in zip(owners, weights, strict=True):
        assert abs(owner - count * weight / total) < len(weights)
    whole = sum(shares.weights)
    start = count * whole
    owners = [shares.owner(number) for number in range(start, start + whole)]
    assert np.bincount(owners, minlength=len(weights)).tolist() == list(shares.weights)


def test_100_000_samples_have_exactly_their_shares():
    shares = mixture().shares
    assert np.bincount([shares.owner(number) for number in range(100_000)]).tolist() == [50_000, 30_000, 20_000]


def test_a_row_is_that_of_its_objective_with_the_fields_of_all():
    chosen, data = mixture(), MockDataset(200, 24, 1, 40)
    alone = [
        build_objective(load_config((RUN + f"--objective {name}").split()), BYTES)
        for name in ("causal", "fim", "prefix")
    ]
    for number in range(40):
        row, owner = chosen(data[number]), chosen.shares.owner(number)
        own = alone[owner](data[number])
        assert int(row.pop("objective_id")) == owner
        assert all(np.array_equal(row[name], array) for name, array in own.items())
        assert all(not row[name].any() for name in row.keys() - own.keys()), "no prefix"
    assert mixture("--objective-mixture fim:3").rate == 0.5, "one objective is no mixture"


def test_rows_are_the_same_for_every_number_of_workers_and_ranks():
    """From the start and from the middle, as after a resume; every objective of decoders, and masked pairs."""
    nsp = "--model-family bert --objective masked --bert-sentence-head nsp --masking-max-ngram 3 "
    for flags in (THREE + "--reset-attention-mask --reset-position-ids", nsp):
        chosen = mixture(flags)
        data = MockDataset(
            200, chosen.sample_tokens(24) - chosen.shared_tokens, 1, 24, extra_tokens=chosen.shared_tokens
        )
        if flags is nsp:
            chosen = chosen.with_documents(data)
        expected = [chosen(data[number]) for number in reversed(range(24))][::-1]
        for workers, size, start in ((0, 1, 0), (1, 2, 0), (2, 1, 8), (0, 4, 8)):
            seen = numbers_of_equal_rows(data, chosen, expected, 24, workers=workers, size=size, start=start)
            assert sorted(seen) == list(range(start, 24))


def test_members_of_other_families_are_refused_once():
    with pytest.raises(ConfigError) as caught:
        load_config((RUN + "--objective-mixture causal:1,masked:1,span:1").split())
    (problem,) = caught.value.problems
    assert "objective_mixture: objective=masked trains encoders, not model_family=gpt" in problem
    members = {"causal": mixture("--objective causal"), "masked": mixture("--model-family bert --objective masked")}
    with pytest.raises(ConfigError, match="masked does not go with causal"):
        MixtureObjective.of(members, dict.fromkeys(members, Fraction(1)), 24)


def test_every_objective_is_known_to_the_rules():
    from megalm.config.rules.objective import FAMILY_OF

    assert set(FAMILY_OF) == set(OBJECTIVES)
