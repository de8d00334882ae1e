"""Random generators by name: the same (seed, purpose, ...) gives the same numbers in every layout and every process."""

from collections.abc import Callable
from typing import TypeVar

import torch

from megalm.randomness import stable_seed

T = TypeVar("T")


def named_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose: `named_generator(seed, "init", parameter_name)`."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(stable_seed(seed, *purpose))
    return generator


def seeded(function: Callable[..., T], seed: int) -> Callable[..., T]:
    """`function` with torch's default generators set to `seed` at the start of each call.

    A second call, as recomputation makes it, draws the same numbers, whatever was drawn in between.
    """

    def call(*args: object, **kwargs: object) -> T:
        torch.manual_seed(seed)
        return function(*args, **kwargs)

    return call
