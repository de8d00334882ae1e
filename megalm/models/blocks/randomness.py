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


def seed_generators(seed: int) -> None:
    """Set torch's default generators, of the CPU and of this rank's device, to `seed`.

    torch.manual_seed sets those of all devices of all kinds. For each kind that is not in use it formats a stack trace
    and keeps it for ever: a sixth of the step of a small model on a CPU, and memory that grows with every layer.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


def seed_part(seed: int | None, *purpose: str | int) -> None:
    """Set torch's default generators for one part of a model by the seed of its batch; None: nothing is drawn."""
    if seed is not None:
        seed_generators(stable_seed(seed, *purpose))


def seeded_layer(step: Callable[..., T], seed: int | None, number: str | int) -> Callable[..., T]:
    """The step of a layer, seeded by the layer's number, so that it drops the same in a stage; None: as it is.

    It is seeded inside the step, for its recomputation.
    """
    return step if seed is None else seeded(step, stable_seed(seed, "layer", number))


def seeded(function: Callable[..., T], seed: int) -> Callable[..., T]:
    """`function` with torch's default generators set to `seed` at the start of each call.

    A second call, as recomputation makes it, draws the same numbers, whatever was drawn in between.
    """

    def call(*args: object, **kwargs: object) -> T:
        seed_generators(seed)
        return function(*args, **kwargs)

    return call
