"""A process group of which only this process is there: collectives take their memory and move nothing."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


class AbsentRanks(dist.ProcessGroup):
    """Rank 0 of `size` ranks. For tensors without values: results have their shape and nothing in them."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        """The sum over the ranks, in place."""
        return _Done()

    def all_gather_single(self, output: Tensor, part: Tensor, options: Any = None) -> dist.Work:
        """The ranks' parts, end to end."""
        return _Done()

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any = None) -> dist.Work:
        """This rank's part of the sum over the ranks."""
        return _Done()


class _Done(dist.Work):
    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        return True


class AnyVocabulary:
    """A tokenizer that has every special token, for what does not depend on its ids."""

    def special(self, name: str) -> int:
        """Some id."""
        return 0

    vocab_size = 1

    def token_id(self, token: str) -> int:
        """Some id."""
        return 0

    def word_starts(self) -> list[bool]:
        """Of the one token."""
        return [True]

    def encode(self, text: str) -> list[int]:
        """Characters by their numbers."""
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters."""
        return "".join(map(chr, ids))
