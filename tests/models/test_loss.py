"""Weighted losses: what is masked adds nothing, not even an infinity."""

import torch

from megalm.models.blocks.loss import scaled_total, weighted_losses


def test_masked_positions_pass_no_gradient_and_no_infinity():
    losses = torch.tensor([[1.0, float("inf"), 2.0, float("nan")]], requires_grad=True)
    total = weighted_losses(losses, torch.tensor([[1, 0, 1, 0]])).sum()
    total.backward()
    assert total.item() == 3.0
    assert losses.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_weighted_losses_are_float32_whatever_the_inputs():
    losses = torch.full((1, 1000), 1.001).bfloat16()
    assert weighted_losses(losses, torch.ones(1, 1000).bfloat16()).dtype == torch.float32


def test_the_total_is_the_sum_of_every_named_loss_times_its_scale():
    losses = {"lm": torch.tensor([[1.0, 2.0]], requires_grad=True), "extra": torch.tensor(4.0, requires_grad=True)}
    total = scaled_total(losses, {"lm": 0.5, "extra": 0.25})
    total.backward()
    assert total.item() == 2.5
    assert losses["lm"].grad.tolist() == [[0.5, 0.5]]
    assert losses["extra"].grad.item() == 0.25
