"""What the activations of one rank's layers take, found by running them on tensors without values.

The model's own code runs, forward and backward, on fake tensors (`FakeTensorMode`): shapes and lifetimes are real, values
are not there, nothing is computed. So the figures follow the kernels and the recomputation that a run would use.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operators inside have made and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            reference, before = self._known[key]
            if size != before:
                self._known[key] = (reference, size)
        else:
            reference, before = weakref.ref(storage, lambda _: self._forget(key)), 0
            self._known[key] = (reference, size)
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]
