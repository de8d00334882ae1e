"""Batches of tokens, and what a whole model makes of them."""

from torch import Tensor, ones

from megalm.data.batch import Batch
from megalm.models.blocks.attention import KVCache
from megalm.models.contract import LanguageModel


def batch_of(tokens: Tensor, labels: Tensor | None = None, *, seed: int | None = None, **fields: Tensor) -> Batch:
    """The batch of these tokens (B, T) and labels (the tokens themselves, where none are given), none masked."""
    labels = tokens if labels is None else labels
    tensors = {"tokens": tokens, "labels": labels, "loss_mask": ones(labels.shape, device=labels.device)}
    return Batch(tensors=tensors | fields, seed=seed)


def token_losses(
    model: LanguageModel, tokens: Tensor, labels: Tensor, *, seed: int | None = None, **fields: Tensor
) -> Tensor:
    """The loss of each token (B, T)."""
    losses_BT: Tensor = model(batch_of(tokens, labels, seed=seed, **fields))["lm"]
    return losses_BT


def logits(model: LanguageModel, tokens: Tensor, cache: KVCache | None = None, **fields: Tensor) -> Tensor:
    """The logits (B, T, V) after each token."""
    logits_BTV: Tensor = model(batch_of(tokens, None, seed=None, **fields), cache, wants_logits=True)
    return logits_BTV
