"""Micro-batches of one data-parallel rank; their order and their seeds depend on sample numbers only.

Each micro-step takes micro_batch_size x size consecutive sample numbers, and rank r the slice
[r x micro_batch_size, (r + 1) x micro_batch_size) of them (Megatron's dataloader_type "single").
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megalm.data.batch import Batch
from megalm.data.samples.sample import Sample, SampleDataset
from megalm.errors import ConfigError, DataError, MegalmError, PlatformError
from megalm.processes import follow_parent
from megalm.randomness import stable_seed
from megalm.storage.faults import attempting, unforeseen

_Arrays = dict[str, npt.NDArray[Any]]
Transform = Callable[[Sample], _Arrays]
"""An objective, as the loader sees it."""
Fields = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]
"""(shape, dtype) of each array of an example."""

_WORKER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What may be sent to all processes of a job, and is the main process's to answer."""
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
    dataset_ids: bool = False,
    fields: Fields | None = None,
    seed: int | None = None,
    speaks: bool = True,
) -> "MicroBatchIterator":
    """An iterator of the micro-batches of samples start_sample .. stop_sample for data-parallel `rank` of `size`.

    Yields batches of tensors [micro_batch_size, ...], global_batch_size / (micro_batch_size x size) of them per global
    batch; a last global batch that is not full is dropped. The order does not depend on `num_workers`.

    Args:
        dataset_ids: batches also hold `dataset_id`, int64 [micro_batch_size]: which dataset each sample comes from.
        fields: what the examples of `transform` must hold; checked on the first one that each process makes.
        seed: the run's; each batch has its own seed of it for what the model draws. None: nothing is drawn.
        speaks: this rank says what is wrong with a sample; others that read the same samples end without a word.

    Raises:
        ConfigError: micro_batch_size x size does not divide global_batch_size. While iterating: an example has other
            fields than `fields`.
        DataError: the dataset has fewer samples than stop_sample. While iterating: what dataset or transform raise.
        PlatformError (while iterating): a worker process died.
    """
    _check_split(global_batch_size, micro_batch_size, size)
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
        _Rows(dataset, transform, fields, dataset_ids=dataset_ids),
        batch_sampler=sampler,
        collate_fn=_stack,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_WorkerStart(os.getpid()),
        multiprocessing_context="fork" if num_workers else None,
    )
    return MicroBatchIterator(loader, len(sampler), pin_memory=pin_memory, seed=seed, speaks=speaks)


def _check_split(global_batch_size: int, micro_batch_size: int, size: int) -> None:
    if global_batch_size % (micro_batch_size * size):
        raise ConfigError(
            f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size={micro_batch_size} x "
            f"data-parallel size {size} = {micro_batch_size * size}"
        )


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


class MicroBatchIterator(Iterator[Batch]):
    """Micro-batches as tensors. Its workers live until it is exhausted, closed or garbage."""

    def __init__(
        self, loader: DataLoader[Any], num_batches: int, *, pin_memory: bool, seed: int | None, speaks: bool
    ) -> None:
        self._num_left, self._pin_memory, self._seed, self._speaks = num_batches, pin_memory, seed, speaks
        # A signal that comes while workers start must not kill them: they inherit the mask and keep it (follow_parent).
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WORKER_SIGNALS)
        child_handler = signal.getsignal(signal.SIGCHLD)
        try:
            # the queues to the workers have their semaphores there
            advice = "free some space there, or give --num-workers 0"
            with attempting("start workers, with semaphores in", "/dev/shm", PlatformError, advice):
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

    def __next__(self) -> Batch:
        """The next micro-batch; errors of a worker come out as they were raised there."""
        try:
            stacked = next(self._batches)
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            died = PlatformError(f"a data loader process died ({error}); {_cause_of_death(str(error))}")
            died.local = True
            raise died from error
        if isinstance(stacked, MegalmError):
            self.close()
            stacked.silent = not self._speaks
            raise stacked
        self._num_left -= 1
        tensors = {name: torch.from_numpy(array) for name, array in stacked.arrays.items()}
        if self._pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        # by the first sample, so that it depends on the run's seed and on how far the run is, on no layout
        seed = None if self._seed is None else stable_seed(self._seed, "dropout", stacked.numbers[0])
        return Batch(tensors=tensors, numbers=stacked.numbers, seed=seed)

    def close(self) -> None:
        """Ends the workers; the iterator is then exhausted."""
        self._batches, self._num_left = iter(()), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Row:
    """One sample's part of a micro-batch."""

    number: int
    arrays: _Arrays


@dataclass(frozen=True)
class _Stacked:
    """A micro-batch as a worker sends it."""

    numbers: tuple[int, ...]
    arrays: _Arrays


class _Rows(Dataset[Any]):
    """Sample number -> batch row; an expected error is returned, since torch would wrap a raised one."""

    def __init__(
        self, dataset: SampleDataset, transform: Transform, fields: Fields | None, *, dataset_ids: bool
    ) -> None:
        self._dataset, self._transform, self._dataset_ids = dataset, transform, dataset_ids
        self._unchecked = fields

    def __getitem__(self, number: int) -> _Row | MegalmError:
        try:
            sample = self._dataset[number]
            arrays = self._transform(sample)
            if self._unchecked is not None:
                _check_fields(self._transform, arrays, self._unchecked)
                self._unchecked = None
        except MegalmError as error:
            return error
        except OSError as error:
            if (refused := unforeseen(error)) is None:
                raise
            return refused
        if self._dataset_ids:
            arrays["dataset_id"] = np.asarray(sample.dataset, dtype=np.int64)
        return _Row(number, arrays)


def _check_fields(transform: Transform, arrays: _Arrays, fields: Fields) -> None:
    """Checks that an example is what its objective says of it.

    Raises:
        ConfigError: it is not.
    """
    stated = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in fields.items()}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    for name in stated | found:
        if stated.get(name) != found.get(name):
            raise ConfigError(
                f"{type(transform).__name__} gives {_shown(found.get(name))} as {name} where its `fields` say "
                f"{_shown(stated.get(name))}; correct one of them"
            )


def _shown(field: tuple[tuple[int, ...], np.dtype[Any]] | None) -> str:
    return "nothing" if field is None else f"{field[1].name} {list(field[0])}"


def _stack(rows: list[_Row | MegalmError]) -> _Stacked | MegalmError:
    """One array per name. Arrays, not tensors: they come through the pipe, so no shared memory can leak or run out."""
    good: list[_Row] = []
    for row in rows:
        if isinstance(row, MegalmError):
            return row
        good.append(row)
    arrays = {name: np.stack([row.arrays[name] for row in good]) for name in good[0].arrays}
    return _Stacked(tuple(row.number for row in good), arrays)


def _cause_of_death(text: str) -> str:
    """What torch's message on a dead worker points to."""
    if "Bus error" in text:  # mapped files: the index cache, and what a library maps
        return (
            "a file that it had mapped was cut or could not be read: look at the data and at --data-cache-path, and "
            "copy them again; the same command continues from the last checkpoint"
        )
    # torch does not always see by which signal a worker died
    return (
        "a kill for lack of memory is the usual cause: lower --num-workers, or give the job more memory; where the log "
        "speaks of a bus error, a file that it had mapped was cut: look at the data"
    )


class _WorkerStart:
    """First thing in a worker (torch has set one thread and its own signal handlers before)."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self, worker: int) -> None:
        follow_parent(self._parent, _WORKER_SIGNALS)
