"""The indexed dataset PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM's: format, writer, reader, manifest.

A program of one's own writes and reads one by the two names here; docs/data.md shows how.
"""

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder

__all__ = ["IndexedDataset", "IndexedDatasetBuilder"]
