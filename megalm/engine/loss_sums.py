"""Sums of named losses and of what they are means over, from micro-batches and ranks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megalm.models.contract import Batch, Losses


class LossSums:
    """Adds up the losses of micro-batches and their counts, over all samples and over those of each dataset."""

    def __init__(
        self, names: tuple[str, ...], counts: Callable[[Batch], Losses], num_datasets: int, device: torch.device
    ) -> None:
        self._names, self._counts, self._num_datasets = names, counts, num_datasets
        self.values = torch.zeros(2, len(names), 1 + num_datasets, dtype=torch.float64, device=device)
        """[sum or count, name, all samples or those of a dataset]."""

    def add(self, losses: Losses, batch: Batch) -> None:
        """One micro-batch; with datasets, `dataset_id` (int64 [B]) of the batch says from which each sample is."""
        counts, datasets = self._counts(batch), batch.get("dataset_id")
        for name, sums in zip(self._names, self.values.unbind(1), strict=True):
            sums[0, 0] += losses[name].sum()  # in float32, as it is trained on
            sums[1, 0] += total(counts[name])
            if self._num_datasets and datasets is not None:
                rows = [
                    values.reshape(len(datasets), -1).sum(1, dtype=torch.float64)
                    for values in (losses[name], counts[name])
                ]
                sums[:, 1:].index_add_(1, datasets, torch.stack(rows))


def total(counts: Tensor) -> Tensor:
    """The sum of counts: a float64 scalar, exact beyond 2^24 tokens."""
    return counts.sum(dtype=torch.float64)


def means(sums: Tensor, counts: Mapping[str, float]) -> dict[str, float]:
    """Every loss from its sum, in the order of `counts`; 0 where nothing counts."""
    return {name: value / max(counts[name], 1.0) for name, value in zip(counts, sums.tolist(), strict=True)}


def dataset_losses(values: Tensor, weights: Mapping[str, float]) -> tuple[float | None, ...]:
    """The loss of each dataset from the last part of `LossSums.values`; None where nothing counts."""
    sums, counts = values.tolist()
    found: list[float | None] = []
    for dataset in range(values.shape[-1]):
        pairs = zip(weights, sums, counts, strict=True)
        mean = {name: of[dataset] / number[dataset] if number[dataset] else 0.0 for name, of, number in pairs}
        found.append(weighted(mean, weights) if any(number[dataset] for number in counts) else None)
    return tuple(found)


def weighted(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss of a model from its named losses."""
    return sum(weight * means[name] for name, weight in weights.items())
