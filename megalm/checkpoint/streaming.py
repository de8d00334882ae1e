"""Writing a safetensors file tensor by tensor, which the library does only for tensors that are all in memory.

Format: https://huggingface.co/docs/safetensors/index#format (a little-endian length, a JSON header, the data).
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megalm.storage.atomic import flush_to_disk
from megalm.storage.durable import open_new

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write the tensors of these names and shapes, in this order, durably; the SHA-256 of the file in hexadecimal.

    `tensor_of` is asked for one at a time, while the one before is hashed and written: in memory are two. The disk
    works meanwhile, and not only once all is there.

    Raises:
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    with open_new(path) as stream, ThreadPoolExecutor(3) as behind:
        running: list[Future[Any]] = []
        to_disk: Future[Any] = behind.submit(os.fdatasync, stream.fileno())

        def put(data: Any) -> None:
            nonlocal to_disk
            for work in running:
                work.result()
            running[:] = [behind.submit(stream.write, data), behind.submit(digest.update, data)]
            if to_disk.done():
                to_disk.result()  # an error is told once
                to_disk = behind.submit(os.fdatasync, stream.fileno())

        put(_header(shapes, dtype, metadata))
        for name, shape in shapes.items():
            tensor = tensor_of(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name} is not as the header says"
            put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        for work in (*running, to_disk):
            work.result()
        flush_to_disk(stream)
    return digest.hexdigest()


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
