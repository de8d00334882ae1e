"""The layout of the `.idx` file (Megatron's "MMIDIDX", version 1): header, dtype codes, array offsets.

All little-endian, no padding, no checksum:

    0 9 bytes magic | 9 u64 version = 1 | 17 u8 dtype code | 18 u64 S sequences | 26 u64 D boundaries
    34 i32[S] tokens per sequence | i64[S] byte offset in .bin | i64[D] document boundaries as sequence numbers
"""

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPES: dict[int, npt.DTypeLike] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes 6 and 7 are float32 and float64, in this order in GPT-NeoX and in the other in Megatron-LM: refused."""

SEQUENCE_BYTES = 4 + 8
"""Bytes that one sequence takes in the index: its length and its offset."""
BOUNDARY_BYTES = 8
"""Bytes that one document boundary takes in the index."""


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The dtype that Megatron-LM chooses for tokens: uint16 below 65,500 ids, else int32 (also when unknown).

    Raises:
        DataError: `vocab_size` is beyond int32, which the format cannot hold.
    """
    if vocab_size is not None and vocab_size > 2**31:
        raise DataError(f"vocab_size={vocab_size} is beyond 2^31, the most that the .bin/.idx format can hold")
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


def code_of(dtype: np.dtype[Any]) -> int:
    """The code of a token dtype.

    Raises:
        DataError: the format has no code for it.
    """
    for code, known in DTYPES.items():
        if np.dtype(known) == dtype:
            return code
    names = ", ".join(np.dtype(known).name for known in DTYPES.values())
    raise DataError(f"dtype {dtype.name} cannot be stored as tokens; use one of {names}")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first 34 bytes of an `.idx` file say."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_boundaries: int

    @property
    def index_bytes(self) -> int:
        """Size that the whole `.idx` file must have."""
        return HEADER.size + SEQUENCE_BYTES * self.num_sequences + BOUNDARY_BYTES * self.num_boundaries

    def pack(self) -> bytes:
        """The 34 bytes."""
        return HEADER.pack(MAGIC, VERSION, code_of(self.dtype), self.num_sequences, self.num_boundaries)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of the `.idx` file at `path`.

    Raises:
        DataError: the file is not a complete index of tokens, in version 1.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as stream:
        raw = stream.read(HEADER.size)
    if raw.startswith(OLD_MAGIC):
        raise DataError(
            f"{path} has the old TNTIDX layout (Megatron's and GPT-NeoX's lazy and cached datasets), "
            "which is not supported; preprocess the text again with `megalm preprocess`"
        )
    if not raw.startswith(MAGIC):
        raise DataError(f"{path} is not an index: it starts with {raw[:9]!r}, not with {MAGIC!r}; give another prefix")
    if len(raw) < HEADER.size:
        raise DataError(f"{path} is cut off: {size} bytes, an index has {HEADER.size} at least; {_COPY_AGAIN}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(raw)
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only version {VERSION} is known: {_COPY_AGAIN}")
    header = Header(dtype=_dtype_of(path, code), num_sequences=num_sequences, num_boundaries=num_boundaries)
    _check_index_bytes(path, header, size)
    return header


_COPY_AGAIN = "copy both files again, or run `megalm preprocess` again"


def _dtype_of(path: str | os.PathLike[str], code: int) -> np.dtype[Any]:
    if code in (6, 7):
        raise DataError(f"{path} holds floating-point numbers (dtype code {code}), not token ids; give another prefix")
    if code not in DTYPES:
        raise DataError(f"{path} has the unknown dtype code {code}; known are {sorted(DTYPES)}: {_COPY_AGAIN}")
    return np.dtype(DTYPES[code])


def _check_index_bytes(path: str | os.PathLike[str], header: Header, size: int) -> None:
    counts = f"{header.num_sequences} sequences and {header.num_boundaries} document boundaries"
    if size == header.index_bytes + header.num_sequences and header.num_sequences > 0:
        raise DataError(f"{path} holds one mode byte per sequence (a multimodal dataset); only text is supported")
    if size != header.index_bytes:
        raise DataError(f"{path} must have {header.index_bytes} bytes for {counts}, but has {size}; {_COPY_AGAIN}")


def check_arrays(
    prefix: str,
    header: Header,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    boundaries: npt.NDArray[np.int64],
    bin_bytes: int,
    *,
    scan: bool = True,
) -> None:
    """Checks lengths, offsets and boundaries against each other and against the size of `.bin`.

    Without `scan` only the ends of the arrays are read: what the last offset says stands for the sum of the lengths.

    Raises:
        DataError: a negative length, an offset that is not the sum of the lengths before it, boundaries that are not in
            order or do not cover the sequences, or a size that differs.
    """
    name = f"{prefix}.idx"
    if header.num_sequences == 0:
        raise DataError(f"{name} holds no sequences; preprocess input that has text")
    if int(lengths.min() if scan else min(lengths[0], lengths[-1])) < 0:
        raise DataError(f"{name} holds a negative sequence length; {_COPY_AGAIN}")
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != header.num_sequences:
        found = [int(b) for b in boundaries[[0, -1]]] if len(boundaries) else []
        raise DataError(
            f"{name} must have document boundaries from 0 to {header.num_sequences}, but has {found}; {_COPY_AGAIN}"
        )
    itemsize = header.dtype.itemsize
    last = int(pointers[-1]) + int(lengths[-1]) * itemsize
    num_tokens = int(lengths.sum(dtype=np.int64)) if scan else last // itemsize
    if int(pointers[0]) != 0 or last != num_tokens * itemsize:
        raise DataError(
            f"{name}: its offsets end at byte {last}, its lengths at {num_tokens * itemsize}; {_COPY_AGAIN}"
        )
    if bin_bytes != num_tokens * itemsize:
        raise DataError(
            f"{prefix}.bin must have {num_tokens * itemsize} bytes for the {num_tokens} tokens ({header.dtype.name}) "
            f"of {name}, but has {bin_bytes}; the two files do not belong together or one is cut off: {_COPY_AGAIN}"
        )
    if scan and (wrong := layout_problems(header.dtype.itemsize, lengths, pointers, boundaries)):
        raise DataError(f"{prefix} is damaged: {'; '.join(wrong)}; {_COPY_AGAIN}")


_STEP = 1 << 15
"""Entries of the index that are looked at together: what they take fits the processor's cache."""


def layout_problems(
    itemsize: int,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    boundaries: npt.NDArray[np.int64],
) -> list[str]:
    """What is wrong with lengths, offsets and document boundaries: one text for the first of each kind."""
    found, expected = [], 0  # where the next sequence must start
    for start in range(0, len(lengths), _STEP):
        part = lengths[start : start + _STEP]
        if int(part.min()) < 0:
            found.append(f"sequence {start + int(np.argmax(part < 0))} has a negative length")
            break
        begins = pointers[start : start + _STEP].copy()  # aligned, which they are not in the file
        ends = begins + np.multiply(part, itemsize, dtype=np.int64)
        right = begins[1:] == ends[:-1]
        if begins[0] != expected or not right.all():
            number = 0 if begins[0] != expected else int(np.argmin(right)) + 1
            wanted = ends[number - 1] if number else expected
            found.append(f"sequence {start + number} must start at byte {wanted}, its offset is {begins[number]}")
            break
        expected = int(ends[-1])
    for start in range(0, len(boundaries) - 1, _STEP):
        edges = boundaries[start : start + _STEP + 1].copy()
        ends_early = edges[1:] < edges[:-1]
        if ends_early.any():
            found.append(f"document {start + int(np.argmax(ends_early))} ends before it starts")
            break
    return found
