"""Which implementation of the operators the model calls."""

from typing import Literal

from megalm.config.base import Section


class KernelsConfig(Section):
    """Fused kernels: compiled once for each machine, checked at load."""

    kernels_backend: Literal["auto", "fused", "reference"] = "auto"
    """Operators of the model and the optimizer: fused ones, torch's (reference), or fused where they can be had
    (auto). `megalm kernels build` compiles them ahead of time."""
