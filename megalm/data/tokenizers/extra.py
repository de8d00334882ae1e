"""Ids after those of a tokenizer, for tokens that it lacks (--vocab-extra-ids)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megalm.data.tokenizers.base import Tokenizer

NEEDED = ("pad", "mask", "cls", "sep", "fim_prefix", "fim_suffix", "fim_middle", "mode_r", "mode_s", "mode_x")
"""What objectives need; what a tokenizer lacks of it takes the last of its extra ids, the last but one, ..., in this
order: for ever, since models are trained on it."""


def from_the_end(special_ids: Mapping[str, int], extra_ids: Sequence[int]) -> dict[str, int]:
    """The ids of what is needed and missing, as many as there is room for."""
    missing = [name for name in NEEDED if name not in special_ids]
    return dict(zip(missing, reversed(extra_ids), strict=False))


class WithExtraIds(Tokenizer):
    """`base` with `count` more ids: <extra_id_0>, ..., of which the last stand for what `base` lacks.

    Texts have the same ids as without them, so that data of the one is data of the other: the identity is `base`'s.
    """

    def __init__(self, base: Tokenizer, count: int) -> None:
        self.base = base
        extra = range(base.vocab_size, base.vocab_size + count)
        self.vocab_size, self.identity = extra.stop, base.identity
        sentinels = {f"extra_id_{number}": id for number, id in enumerate(extra)}
        self.special_ids = base.special_ids | sentinels | from_the_end(base.special_ids, extra)

    @property
    def extra_names(self) -> list[str]:
        """The tokens after those of `base`, in their order."""
        return [f"<extra_id_{number}>" for number in range(self.vocab_size - self.base.vocab_size)]

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self.special_ids.get(token[1:-1]) if token in self.extra_names else self.base.token_id(token)

    def word_starts(self) -> list[bool] | None:
        """As `base`; what is added begins none."""
        starts = self.base.word_starts()
        return starts and starts + [False] * len(self.extra_names)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return self.base.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; those that are added give none."""
        return self.base.decode([i for i in ids if i < self.base.vocab_size])

    def __getattr__(self, name: str) -> Any:
        """What only some tokenizers have (`token`, ...)."""
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)
