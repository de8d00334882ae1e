"""Sums of named losses: they do not depend on how the batch is cut, and each name has its own denominator."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.engine.loss_sums import LossSums, losses_of_kinds, means, total, weighted
from megalm.testing.batches import batch_of

CPU = torch.device("cpu")


def masks(batch):
    return {"lm": batch["loss_mask"]}


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40), st.integers(1, 8))
def test_sum_and_count_of_the_parts_are_those_of_the_whole(pairs, parts):
    losses = torch.tensor([[float(loss * kept) for loss, kept in pairs]])
    mask = torch.tensor([[float(kept) for _, kept in pairs]])
    sums = LossSums(("lm",), masks, {}, CPU)
    for piece, piece_mask in zip(losses.chunk(parts, 1), mask.chunk(parts, 1), strict=True):
        sums.add({"lm": piece}, batch_of(piece.long(), loss_mask=piece_mask))
    assert sums.values[:, 0, 0].tolist() == [losses.sum().item(), mask.sum().item()]


def test_counts_are_exact_in_any_dtype():
    assert total(torch.ones(1, 1000).bfloat16()).item() == 1000
    assert total(torch.ones(1, 1000).bool()).item() == 1000


def test_every_name_and_every_kind_of_samples_has_its_own_sum():
    sums = LossSums(
        ("lm", "order"),
        lambda batch: {"lm": batch["loss_mask"], "order": torch.ones(len(batch["tokens"]))},
        {"objective_id": 2, "dataset_id": 3},
        CPU,
    )
    lm = torch.tensor([[1.0, 2.0], [4.0, 0.0], [0.0, 16.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    order = torch.tensor([0.5, 1.0, 2.0])
    datasets = torch.tensor([2, 0, 2])
    objectives = torch.tensor([0, 1, 1])
    sums.add(
        {"lm": lm, "order": order},
        batch_of(lm.long(), loss_mask=mask, dataset_id=datasets, objective_id=objectives),
    )
    sums.add({"lm": lm[:1], "order": order[:1]}, batch_of(lm[:1].long(), loss_mask=mask[:1], dataset_id=datasets[1:2]))
    assert sums.values[0].tolist() == [[26.0, 3.0, 20.0, 7.0, 0.0, 19.0], [4.0, 0.5, 3.0, 1.5, 0.0, 2.5]]
    assert sums.values[1].tolist() == [[6.0, 2.0, 2.0, 3.0, 0.0, 3.0], [4.0, 1.0, 2.0, 2.0, 0.0, 2.0]]
    weights = {"lm": 1.0, "order": 0.5}
    whole = means(sums.values[0, :, 0], {"lm": 6.0, "order": 4.0})
    assert whole == {"lm": 26 / 6, "order": 1.0}
    assert weighted(whole, weights) == 26 / 6 + 0.5
    assert losses_of_kinds(sums.of_kind(sums.values, "objective_id"), weights) == (1.5 + 0.25, 10 + 0.75)
    assert losses_of_kinds(sums.of_kind(sums.values, "dataset_id"), weights) == (
        7 / 3 + 0.5 * 0.75,
        None,
        19 / 3 + 0.5 * 1.25,
    )
