"""Ids after those of a tokenizer, for tokens that it lacks (--vocab-extra-ids)."""

from collections.abc import Mapping, Sequence

NEEDED = ("pad", "mask", "cls", "sep", "fim_prefix", "fim_suffix", "fim_middle", "mode_r", "mode_s", "mode_x")
"""What objectives need; what a tokenizer lacks of it takes the last of its extra ids, the last but one, ..., in this
order: for ever, since models are trained on it."""


def from_the_end(special_ids: Mapping[str, int], extra_ids: Sequence[int]) -> dict[str, int]:
    """The ids of what is needed and missing, as many as there is room for."""
    missing = [name for name in NEEDED if name not in special_ids]
    return dict(zip(missing, reversed(extra_ids), strict=False))
