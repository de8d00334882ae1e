"""Slices of named global tensors: how a rank says which part of the model's state it holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StateSlice:
    """Elements start..stop (row-major) of the global tensor `name`, as fp32 views into the live optimizer state.

    Writing into the views changes the state. `moments` maps "exp_avg" and "exp_avg_sq" to views like `weight`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]

    def tensors(self, with_moments: bool = True) -> dict[str, torch.Tensor]:
        """Views by kind: "weight" first, then the moments."""
        return {"weight": self.weight, **(self.moments if with_moments else {})}
