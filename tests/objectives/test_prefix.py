"""Prefix language modelling: what is prefix, what has a loss, and that no prediction sees its answer."""

import numpy as np
import pytest
import torch

from megalm.data.samples.sample import Sample
from megalm.models.blocks.attention import CausalAttention
from megalm.models.blocks.documents import Documents
from megalm.objectives.causal import CausalObjective
from megalm.objectives.prefix import PrefixObjective

EOD = 0


def row_of(number, *tokens, **options):
    objective = PrefixObjective(causal=CausalObjective(eod=EOD, **options), seed=3)
    row = objective(Sample(number, 0, np.asarray(tokens, dtype=np.int64)))
    fields = objective.fields(len(tokens) - 1)
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in fields.items()
    }
    return row


def visible(row):
    """bool [T, T]: what each position sees, by the attention that models have."""
    T = len(row["tokens"])
    cu_seqlens = torch.from_numpy(row.get("cu_seqlens", np.array([0, T], dtype=np.int32)))[None]
    documents = Documents.of_batch(cu_seqlens, torch.device("cpu"), torch.from_numpy(row["prefix_lengths"])[None])
    q = k = torch.zeros(1, T, 1, T)
    return (CausalAttention(0.0)(q, k, torch.eye(T)[None, :, None], documents)[0, :, 0] > 0).numpy()


@pytest.mark.parametrize("options", [{}, {"reset_attention_mask": True}])
@pytest.mark.parametrize(
    "tokens", [range(1, 13), [5, 6, EOD, 7, 8, 9, EOD, 10, EOD, 11, 12, 13], [4, 5, 6, -1, -1], [-1] * 4]
)
def test_what_has_a_loss_is_not_seen_and_the_rest_is_prefix(options, tokens):
    counts = []
    for number in range(60):
        row = row_of(number, *tokens, **options)
        sees, T = visible(row), len(tokens) - 1
        real = np.asarray(tokens)[1:] != -1
        starts = row["cu_seqlens"][row["cu_seqlens"] < T] if options else np.array([0])
        for start, stop, prefix in zip(starts, [*starts[1:], T], row["prefix_lengths"], strict=False):
            labelled = int(real[start:stop].sum())
            assert (1 <= prefix <= max(labelled - 1, 1)) if labelled else prefix == 0
            own = sees[start:stop, start:stop]
            expected = np.tri(stop - start, dtype=bool)
            expected[:prefix, :prefix] = True
            assert (own == expected).all()
            with_loss = np.flatnonzero(row["loss_mask"][start:stop])
            assert with_loss.tolist() == list(range(max(int(prefix) - 1, 0), labelled))
            assert not any(own[place, place + 1 :].any() for place in with_loss), "no answer is seen"
            counts.append(prefix)
    assert len(set(counts)) > 1 or max(tokens) < 7


def test_every_length_of_a_prefix_is_as_likely():
    drawn = [int(row_of(number, *range(1, 12))["prefix_lengths"][0]) for number in range(4_000)]
    shares = np.bincount(drawn)[1:] / len(drawn)
    assert len(shares) == 9
    assert shares == pytest.approx([1 / 9] * 9, abs=0.02)
    assert drawn[:50] == [int(row_of(n, *range(1, 12))["prefix_lengths"][0]) for n in reversed(range(50))][::-1]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 2, "softcap": 2.0}])
def test_windows_and_caps_hold_in_prefixes_and_gradients_flow(options):
    torch.manual_seed(0)
    T, prefixes, cu_seqlens = (
        12,
        torch.tensor([[7, 3, *[0] * 10], [5, *[0] * 11]]),
        torch.tensor([[0, 8, *[12] * 11], [0, *[12] * 12]]),
    )
    q, k, v = (torch.randn(2, T, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = CausalAttention(0.0, **options)(q, k, v, Documents.of_batch(cu_seqlens, q.device, prefixes))
    mask = torch.zeros(2, T, T, dtype=torch.bool)
    for row, start, stop, prefix in ((0, 0, 8, 7), (0, 8, 12, 3), (1, 0, 12, 5)):
        block = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        block[:prefix, :prefix] = True
        mask[row, start:stop, start:stop] = block
    if "window" in options:
        mask &= torch.ones(T, T, dtype=torch.bool).triu(-options["window"])
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, keys) / 8**0.5
    if "softcap" in options:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    wanted = torch.einsum("bhts,bshc->bthc", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), values)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
