"""How what is read and what is written of a denoised text become a batch row: for an encoder-decoder, or a decoder.

Shapes: S encoder, T decoder, or in a decoder alone the row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalm.config.spans import Denoising, SequenceIds
from megalm.objectives.base import Example, Field, Statistics, filled

Ids = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]


class Form(Protocol):
    """One of the two."""

    def text_tokens(self, kind: Denoising) -> int:
        """Tokens of the longest text that there is room for, whatever is made of it."""

    def fields(self) -> Mapping[str, Field]:
        """The fields of every row, in their order."""

    def row(self, inputs: Ids, targets: Ids, ids: SequenceIds) -> Example:
        """The arrays of a text of which `inputs` are read and `targets` written."""

    def statistics(self, batch: Arrays, sentinels: Sequence[int], head: int = 0) -> Statistics:
        """Share of texts that is noise, mean span, share of padding; `head`: tokens in front of what is read."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderForm:
    """`tokens` and `padding_mask` [S], `decoder_tokens`, `labels` and `loss_mask` [T].

    Behind the end of a text `padding_mask` (bool) is False and `loss_mask` (float32) 0.
    """

    encoder_length: int
    decoder_length: int

    def text_tokens(self, kind: Denoising) -> int:
        """Of the longest text that both have room for."""
        return kind.text_tokens(self.encoder_length, self.decoder_length)

    def fields(self) -> Mapping[str, Field]:
        """The fields of every row, in their order."""
        return {
            "tokens": Field((self.encoder_length,), np.int64),
            "padding_mask": Field((self.encoder_length,), np.bool_),
            "decoder_tokens": Field((self.decoder_length,), np.int64),
            "labels": Field((self.decoder_length,), np.int64),
            "loss_mask": Field((self.decoder_length,), np.float32),
        }

    def row(self, inputs: Ids, targets: Ids, ids: SequenceIds) -> Example:
        """The decoder reads the targets moved on by one, from a start token."""
        decoder, S, T = np.concatenate(([ids.start], targets[:-1])), self.encoder_length, self.decoder_length
        return {
            "tokens": filled(inputs, S, ids.pad),
            "padding_mask": np.arange(S) < len(inputs),
            "decoder_tokens": filled(decoder, T, ids.pad),
            "labels": filled(targets, T, ids.pad),
            "loss_mask": (np.arange(T) < len(targets)).astype(np.float32),
        }

    def statistics(self, batch: Arrays, sentinels: Sequence[int], head: int = 0) -> Statistics:
        """Padding is that of both."""
        read = int(np.count_nonzero(batch["padding_mask"]))
        room = batch["tokens"].size + batch["labels"].size
        written = int(np.count_nonzero(batch["loss_mask"]))
        return _noise(batch, sentinels, read, head) | {"padding_share": (room - read - written, room)}


@dataclass(frozen=True, kw_only=True)
class DecoderForm:
    """`tokens`, `labels` and `loss_mask` [T], `prefix_lengths` (int32 [1]): what is written stands behind what is read.

    What is read is a prefix whose tokens see one another; its last one predicts the first token that is written.
    Source: Tay et al. 2022, arXiv:2205.05131, section 3.2 (decoders: input and target in one sequence, as prefix-LM).
    """

    length: int

    def text_tokens(self, kind: Denoising) -> int:
        """Of the longest text of which both have room in a row."""
        return kind.row_tokens(self.length)

    def fields(self) -> Mapping[str, Field]:
        """The fields of every row, in their order."""
        return {
            "tokens": Field((self.length,), np.int64),
            "labels": Field((self.length,), np.int64),
            "loss_mask": Field((self.length,), np.float32),
            "prefix_lengths": Field((1,), np.int32),
        }

    def row(self, inputs: Ids, targets: Ids, ids: SequenceIds) -> Example:
        """Both as one sequence, and the next token of each place from the last one of what is read on."""
        both, places = np.concatenate((inputs, targets)), np.arange(self.length)
        is_written = (places >= len(inputs) - 1) & (places < len(both) - 1)
        return {
            "tokens": filled(both[:-1], self.length, ids.pad),
            "labels": filled(both[1:], self.length, ids.pad),
            "loss_mask": is_written.astype(np.float32),
            "prefix_lengths": np.asarray([len(inputs)], dtype=np.int32),
        }

    def statistics(self, batch: Arrays, sentinels: Sequence[int], head: int = 0) -> Statistics:
        """The last token that is written is a label only, and takes no place."""
        read, room = int(batch["prefix_lengths"].sum()), batch["tokens"].size
        written = int(np.count_nonzero(batch["loss_mask"])) - len(batch["tokens"])
        return _noise(batch, sentinels, read, head) | {"padding_share": (room - read - written, room)}


def _noise(batch: Arrays, sentinels: Sequence[int], read: int, head: int) -> dict[str, tuple[float, float]]:
    rows, is_written = len(batch["tokens"]), batch["loss_mask"] > 0
    spans = int(np.isin(batch["labels"][is_written], sentinels).sum())
    noise = int(np.count_nonzero(is_written)) - spans - rows  # each ends with an end of text
    return {"mask_rate": (noise, noise + read - spans - rows * (1 + head)), "mean_span": (noise, spans)}
