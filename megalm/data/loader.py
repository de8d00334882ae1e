"""Micro-batches of one data-parallel rank, in an order that depends on sample numbers only.

Each micro-step takes micro_batch_size x size consecutive sample numbers, and rank r the slice
[r x micro_batch_size, (r + 1) x micro_batch_size) of them (Megatron's dataloader_type "single").
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megalm.data.samples.gpt_dataset import Sample, SampleDataset
from megalm.errors import ConfigError, DataError, MegalmError, PlatformError
from megalm.processes import follow_parent

Transform = Callable[[Sample], dict[str, npt.NDArray[Any]]]
MicroBatch = dict[str, torch.Tensor]
_Stacked = dict[str, npt.NDArray[Any]]

_WORKER_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREFETCH = 4
"""Micro-batches that each worker prepares ahead."""


def build_loader(
    dataset: SampleDataset,
    transform: Transform,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    start_sample: int,
    stop_sample: int,
    rank: int,
    size: int,
    num_workers: int,
    pin_memory: bool = False,
    dataset_of: Callable[[int], int] | None = None,
) -> "MicroBatchIterator":
    """An iterator of the micro-batches of samples start_sample .. stop_sample for data-parallel `rank` of `size`.

    Yields dicts of tensors [micro_batch_size, ...], global_batch_size / (micro_batch_size x size) of them per global
    batch; a last global batch that is not full is dropped. The order does not depend on `num_workers`. With
    `dataset_of` (sample number -> dataset number) there is also `dataset_id`, int64 [micro_batch_size].

    Raises:
        ConfigError: micro_batch_size x size does not divide global_batch_size.
        DataError: the dataset has fewer samples than stop_sample. While iterating: what dataset or transform raise.
        PlatformError (while iterating): a worker process died.
    """
    if global_batch_size % (micro_batch_size * size):
        raise ConfigError(
            f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size={micro_batch_size} x "
            f"data-parallel size {size} = {micro_batch_size * size}"
        )
    if not 0 <= start_sample <= stop_sample <= len(dataset):
        raise DataError(
            f"samples {start_sample} .. {stop_sample} are wanted, the dataset has {len(dataset)}; "
            "build it with a larger number of samples"
        )
    full = (stop_sample - start_sample) // global_batch_size * global_batch_size
    sampler = MicroBatchSampler(
        micro_batch_size=micro_batch_size, start=start_sample, stop=start_sample + full, rank=rank, size=size
    )
    # fork, not spawn or forkserver. Start: 20 ms instead of an import of torch per worker and rank. Safety: gloo
    # and CUDA threads of the parent do not exist in the child, and a child must not need their locks; here it runs
    # numpy only (no collective, no CUDA, no torch operator), and malloc, the GIL and logging survive a fork. What a
    # child inherits, such as the sockets of gloo, it holds for a second at most after its parent ended
    # (follow_parent). forkserver would not be safer: SIGTERM to the process group kills the server, which ends
    # all workers, and then the checkpoint that the signal asked for is never written.
    loader: DataLoader[Any] = DataLoader(
        _Rows(dataset, transform, dataset_of),
        batch_sampler=sampler,
        collate_fn=_stack,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_WorkerStart(os.getpid()),
        multiprocessing_context="fork" if num_workers else None,
    )
    return MicroBatchIterator(loader, len(sampler), pin_memory=pin_memory)


class MicroBatchSampler(Sampler[list[int]]):
    """The sample numbers of one rank's micro-batches, from `start` to `stop`; both count samples of all ranks."""

    def __init__(self, *, micro_batch_size: int, start: int, stop: int, rank: int, size: int) -> None:
        self._micro_batch_size, self._step = micro_batch_size, micro_batch_size * size
        self._start, self._stop, self._shift = start, stop, micro_batch_size * rank

    def __len__(self) -> int:
        return (self._stop - self._start) // self._step

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self._start + self._shift, self._start + len(self) * self._step, self._step):
            yield list(range(first, first + self._micro_batch_size))


class MicroBatchIterator(Iterator[MicroBatch]):
    """Micro-batches as tensors. Its workers live until it is exhausted, closed or garbage."""

    def __init__(self, loader: DataLoader[Any], num_batches: int, *, pin_memory: bool) -> None:
        self._num_left, self._pin_memory = num_batches, pin_memory
        # A signal that comes while workers start must not kill them: they inherit the mask and keep it (follow_parent).
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WORKER_SIGNALS)
        child_handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._batches: Any = iter(loader) if num_batches else iter(())
        finally:
            # torch's handler raises in whatever the main thread is doing, such as saving a checkpoint, when a worker
            # dies; without it `next` finds out, within 5 s.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, child_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __len__(self) -> int:
        """Micro-batches still to come."""
        return self._num_left

    def __next__(self) -> MicroBatch:
        """The next micro-batch; errors of a worker come out as they were raised there."""
        try:
            batch = next(self._batches)
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            died = PlatformError(
                f"a data loader process died ({error}); a kill for lack of memory is the usual cause: "
                "lower --num-workers, or give the job more memory"
            )
            died.local = True
            raise died from error
        if isinstance(batch, MegalmError):
            self.close()
            raise batch
        self._num_left -= 1
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if self._pin_memory else tensors

    def close(self) -> None:
        """Ends the workers; the iterator is then exhausted."""
        self._batches, self._num_left = iter(()), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rows(Dataset[Any]):
    """Sample number -> batch row; an expected error is returned, since torch would wrap a raised one."""

    def __init__(self, dataset: SampleDataset, transform: Transform, dataset_of: Callable[[int], int] | None) -> None:
        self._dataset, self._transform, self._dataset_of = dataset, transform, dataset_of

    def __getitem__(self, number: int) -> _Stacked | MegalmError:
        try:
            row = self._transform(self._dataset[number])
        except MegalmError as error:
            return error
        if self._dataset_of is not None:
            row["dataset_id"] = np.asarray(self._dataset_of(number), dtype=np.int64)
        return row


def _stack(rows: list[_Stacked | MegalmError]) -> _Stacked | MegalmError:
    """One array per name. Arrays, not tensors: they come through the pipe, so no shared memory can leak or run out."""
    arrays: list[_Stacked] = []
    for row in rows:
        if isinstance(row, MegalmError):
            return row
        arrays.append(row)
    return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}


class _WorkerStart:
    """First thing in a worker (torch has set one thread and its own signal handlers before)."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self, worker: int) -> None:
        follow_parent(self._parent, _WORKER_SIGNALS)
