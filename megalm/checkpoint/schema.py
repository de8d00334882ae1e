"""What the manifest of a checkpoint must be beyond JSON: the kinds of its values, and slices that fill each tensor."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from megalm.distributed.shards import Box
from megalm.storage.documents import STRICT, Count, DocumentError, PlainName, Sha256

Counts = Annotated[list[Count], Field(max_length=16)]
"""One number for each dim."""


@with_config(STRICT)
class FileEntry(TypedDict):
    """A shard."""

    bytes: Count
    sha256: Sha256
    rank: Count


@with_config(STRICT)
class SliceEntry(TypedDict):
    """Elements start..stop of a box of a tensor, and the shard that holds them."""

    file: PlainName
    offsets: Counts
    sizes: Counts
    start: Count
    stop: Count


@with_config(STRICT)
class TensorEntry(TypedDict):
    """A global tensor."""

    shape: Counts
    kinds: Annotated[list[str], Field(min_length=1)]
    slices: list[SliceEntry]


def check_contents(files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]) -> None:
    """Checks that there are tensors, that each is made up of its slices, and that their shards are listed.

    Raises:
        DocumentError: what is wrong first.
    """
    if not tensors:
        raise DocumentError("it names no tensor")
    for name, tensor in tensors.items():
        kinds = tensor["kinds"]
        if kinds != ["memory"] and ("weight" not in kinds or len(set(kinds)) < len(kinds)):
            raise DocumentError(f"the kinds of {name} must be weight and others, each once, or memory alone")
        holders = [piece["file"] for piece in tensor["slices"]]
        if missing := set(holders) - set(files):
            raise DocumentError(f"{name} lies in {min(missing)}, which is not among the files")
        if len(set(holders)) < len(holders):
            raise DocumentError(f"two slices of {name} lie in one shard, which holds one for each name")
        _check_partition(name, tensor)


def _check_partition(name: str, tensor: TensorEntry) -> None:
    """Checks that each element of a tensor lies in exactly one slice; beyond the tensor may be padding."""
    whole = Box.whole(tuple(tensor["shape"]))
    ranges: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for piece in tensor["slices"]:
        box = Box(tuple(piece["offsets"]), tuple(piece["sizes"]))
        inside = piece["start"] <= piece["stop"] <= box.numel
        if not inside or not len(box.offsets) == len(box.sizes) == len(whole.sizes):
            raise DocumentError(f"a slice of {name} in {piece['file']} lies outside of its box")
        ranges[box].append((piece["start"], piece["stop"]))
    parts = [part for box, found in ranges.items() for part in _parts(name, box, whole, found)]
    held = sum(part.numel for part in parts)
    if held < whole.numel:
        raise DocumentError(f"the slices of {name} hold {held} of its {whole.numel} elements")
    if held > whole.numel or _overlap(parts):
        raise DocumentError(f"slices of {name} overlap")


def _parts(name: str, box: Box, whole: Box, ranges: list[tuple[int, int]]) -> list[Box]:
    """What ranges of a box hold of the tensor, as few boxes."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start < joined[-1][1]:
            raise DocumentError(f"slices of {name} overlap")
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    boxes = (whole.intersection(part) for start, stop in joined for _, part in box.of_range(start, stop))
    return [part for part in boxes if part.numel]


def _overlap(parts: list[Box]) -> bool:
    """Whether two boxes share elements; a sweep along the first dim, which is where most are cut."""
    if not parts or not parts[0].sizes:
        return len(parts) > 1
    open_parts: list[Box] = []
    for part in sorted(parts, key=lambda part: part.offsets[0]):
        open_parts = [other for other in open_parts if other.offsets[0] + other.sizes[0] > part.offsets[0]]
        if any(part.intersection(other).numel for other in open_parts):
            return True
        open_parts.append(part)
    return False
