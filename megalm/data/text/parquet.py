"""Parquet tables as columns of texts, batch by batch."""

from collections.abc import Iterator
from typing import IO, Any

from megalm.config.merging.suggest import did_you_mean
from megalm.errors import DataError, PlatformError
from megalm.storage.faults import system_fault


class DamagedError(Exception):
    """What Arrow says of a file that is no complete Parquet file."""


def num_row_groups(path: str, stream: IO[bytes]) -> list[int]:
    """Bytes in memory of each row group of a Parquet file.

    Raises:
        DamagedError: it is none, or cut off.
    """
    metadata = _open(stream).metadata
    return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def batches(
    path: str, stream: IO[bytes], keys: tuple[str, ...], first_group: int, stop_group: int | None, batch_bytes: int
) -> Iterator[tuple[list[Any], ...]]:
    """The values of the columns `keys` in the row groups first_group .. stop_group - 1, about `batch_bytes` at once.

    Raises:
        DataError: a column that is not there.
        DamagedError: a file that is damaged.
    """
    import pyarrow as arrow

    table = _open(stream)
    names = table.schema_arrow.names
    if twice := [key for key in keys if names.count(key) > 1]:
        raise DataError(f"{path} has {names.count(twice[0])} columns named {twice[0]}; rename them, or leave one out")
    if missing := [key for key in keys if key not in names]:
        raise DataError(
            f"{path} has no column {missing[0]}; its columns are {', '.join(names[:12])}: give --json-keys"
            + did_you_mean(missing[0], names)
        )
    stop = table.metadata.num_row_groups if stop_group is None else stop_group
    for group in range(first_group, stop):
        about = table.metadata.row_group(group)
        rows = max(1, batch_bytes * about.num_rows // max(1, about.total_byte_size))
        try:
            for batch in table.iter_batches(
                rows, row_groups=[group], columns=list(dict.fromkeys(keys)), use_threads=False
            ):
                yield tuple(batch.column(key).to_pylist() for key in keys)
        # ValueError and its kin: values that Python's types do not hold, such as a date in year 0
        except (arrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError, TypeError) as error:
            raise _damage(error) from error


def _open(stream: IO[bytes]) -> Any:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise PlatformError("reading .parquet needs the package pyarrow; `pip install pyarrow`") from error
    try:
        return parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
    except (arrow.ArrowException, OSError) as error:
        raise _damage(error) from error


def _damage(error: Exception) -> Exception:
    """What Arrow raises for a damaged file is at times an OSError; one that is the system's own stays."""
    return system_fault(error) or DamagedError(str(error))
