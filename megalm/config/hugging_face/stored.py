"""Looking into safetensors without a tensor library, before anything heavy is imported.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), then
the data. Source: the format's own description, https://github.com/huggingface/safetensors#format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.storage.documents import DocumentError, parse_json

_CHUNK = 1 << 24


def differ(folder: Path, one: str, other: str) -> bool:
    """Whether a model folder has both tensors, with different contents; what cannot be read differs in nothing here."""
    try:
        files = _files(folder)
        if one not in files or other not in files:
            return False
        first, second = (_Span.of(folder / files[name], name) for name in (one, other))
        return first.size != second.size or any(a != b for a, b in zip(first.chunks(), second.chunks(), strict=True))
    except (OSError, DocumentError, ValueError, KeyError, TypeError):
        return False  # whoever opens the weights says what is wrong with them


def _files(folder: Path) -> dict[str, str]:
    """Tensor -> file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = parse_json(index.read_bytes())["weight_map"]
        return weight_map
    return dict.fromkeys(_header(folder / "model.safetensors")[0], "model.safetensors")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, Any] = parse_json(file.read(length))
    return header, 8 + length


class _Span:
    """The bytes of one tensor."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self.path, self.start, self.size = path, start, stop - start

    @classmethod
    def of(cls, path: Path, name: str) -> "_Span":
        """Those of the tensor `name` of a file."""
        header, begin = _header(path)
        start, stop = header[name]["data_offsets"]
        return cls(path, begin + start, begin + stop)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a part at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, _CHUNK):
                yield file.read(min(_CHUNK, self.size - done))
