"""Sums of named losses and of what they are means over, from micro-batches and ranks, also of kinds of samples."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megalm.models.contract import Batch, Losses


class LossSums:
    """Adds up the losses of micro-batches and their counts, over all samples and over those of each kind.

    `kinds`: field of the batch (int64 [B]: "dataset_id", "objective_id") -> the number of its values.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        counts: Callable[[Batch], Losses],
        kinds: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self._names, self._counts, self._kinds = names, counts, kinds
        self.values = torch.zeros(2, len(names), 1 + sum(kinds.values()), dtype=torch.float64, device=device)
        """[sum or count, name, all samples or those of a kind, field by field]."""

    def of_kind(self, values: Tensor, field: str) -> Tensor:
        """The part of `values` that is of the kinds of one field."""
        fields = list(self._kinds)
        before = 1 + sum(self._kinds[name] for name in fields[: fields.index(field)])
        return values[..., before : before + self._kinds[field]]

    def add(self, losses: Losses, batch: Batch) -> None:
        """One micro-batch."""
        counts = self._counts(batch)
        kinds = [(field, ids) for field in self._kinds if (ids := batch.get(field)) is not None]
        for name, sums in zip(self._names, self.values.unbind(1), strict=True):
            sums[0, 0] += losses[name].sum()  # in float32, as it is trained on
            sums[1, 0] += total(counts[name])
            for field, ids in kinds:
                rows = [
                    values.reshape(len(ids), -1).sum(1, dtype=torch.float64) for values in (losses[name], counts[name])
                ]
                self.of_kind(sums, field).index_add_(1, ids, torch.stack(rows))


def total(counts: Tensor) -> Tensor:
    """The sum of counts: a float64 scalar, exact beyond 2^24 tokens."""
    return counts.sum(dtype=torch.float64)


def means(sums: Tensor, counts: Mapping[str, float]) -> dict[str, float]:
    """Every loss from its sum, in the order of `counts`; 0 where nothing counts."""
    return {name: value / max(counts[name], 1.0) for name, value in zip(counts, sums.tolist(), strict=True)}


def losses_of_kinds(values: Tensor, weights: Mapping[str, float]) -> tuple[float | None, ...]:
    """The loss of each kind from `LossSums.of_kind`; None where nothing counts."""
    sums, counts = values.tolist()
    found: list[float | None] = []
    for kind in range(values.shape[-1]):
        pairs = zip(weights, sums, counts, strict=True)
        mean = {name: of[kind] / number[kind] if number[kind] else 0.0 for name, of, number in pairs}
        found.append(weighted(mean, weights) if any(number[kind] for number in counts) else None)
    return tuple(found)


def weighted(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss of a model from its named losses."""
    return sum(weight * means[name] for name, weight in weights.items())
