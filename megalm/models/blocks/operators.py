"""Which operators the modules of a model call: every module with a `use_kernels` takes them from one choice."""

from typing import Protocol, runtime_checkable

from torch import nn

from megalm.kernels.backend import Kernels


@runtime_checkable
class UsesKernels(Protocol):
    """A module that calls operators of which there are several implementations."""

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module of `model` call these kernels (a model is built with the references)."""
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.use_kernels(kernels)
