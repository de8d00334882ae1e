"""Order of samples, and what happens to worker processes."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from megalm.data.loader import build_loader
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.samples.sample import Sample
from megalm.data.samples.stream import StreamDataset
from megalm.errors import ConfigError, DataError, PlatformError
from megalm.randomness import stable_seed


class Numbers:
    """Sample k is [k, k], of dataset k % 3; sample 13 is broken when asked for."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> Any:
        if self.broken and number == 13:
            raise DataError("sample 13 cannot be read; copy the data again")
        return Sample(number, number % 3, np.asarray([number, number]))


def as_row(sample: Any) -> dict[str, Any]:
    return {"tokens": sample.tokens[:1], "pid": np.int64(os.getpid())}


def loader(dataset: Any = None, transform: Any = as_row, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "micro_batch_size": 2, "global_batch_size": 8, "start_sample": 0, "stop_sample": 24, "rank": 0, "size": 2,
        "num_workers": 0,
    }  # fmt: skip
    return build_loader(dataset or Numbers(), transform, **options | changes)


def numbers(batches: Any) -> list[list[int]]:
    return [batch["tokens"].flatten().tolist() for batch in batches]


def test_ranks_take_neighbouring_slices_of_each_micro_step() -> None:
    assert numbers(loader(rank=0, stop_sample=8)) == [[0, 1], [4, 5]]
    assert numbers(loader(rank=1, stop_sample=8)) == [[2, 3], [6, 7]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_order_does_not_depend_on_workers(num_workers: int) -> None:
    assert numbers(loader(num_workers=num_workers)) == numbers(loader())


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (2, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_each_global_batch_is_the_same_set_under_every_layout(micro_batch_size: int, size: int) -> None:
    steps = 8 // (micro_batch_size * size)
    layout = {"micro_batch_size": micro_batch_size, "size": size}
    ranks = [numbers(loader(rank=rank, start_sample=8, **layout)) for rank in range(size)]
    for step in range(2):
        taken = [n for rank in ranks for batch in rank[step * steps : (step + 1) * steps] for n in batch]
        assert sorted(taken) == list(range(8 * (step + 1), 8 * (step + 2)))


def test_starting_later_gives_the_rest_of_the_same_order() -> None:
    assert numbers(loader(start_sample=8)) == numbers(loader())[2:]


def test_a_global_batch_that_is_not_full_is_dropped() -> None:
    batches = loader(stop_sample=23)
    assert len(batches) == 4
    assert numbers(batches) == numbers(loader(stop_sample=16))
    assert numbers(loader(stop_sample=7)) == []


def test_rows_are_stacked_to_tensors() -> None:
    from megalm.objectives.causal import CausalObjective

    batch = next(loader(MockDataset(100, 16, 1, 50), CausalObjective(), num_workers=1))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.tensors.items()} == {
        "tokens": (torch.Size([2, 16]), torch.int64),
        "labels": (torch.Size([2, 16]), torch.int64),
        "loss_mask": (torch.Size([2, 16]), torch.float32),
    }


def test_a_batch_size_that_the_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=8 must be a multiple of micro_batch_size=3 x .* 2 = 6"):
        loader(micro_batch_size=3)


def test_more_samples_than_the_dataset_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"samples 0 \.\. 101 are wanted, the dataset has 100"):
        loader(stop_sample=101)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_sample_comes_out_unchanged(num_workers: int) -> None:
    batches = loader(Numbers(broken=True), num_workers=num_workers)
    assert numbers([next(batches) for _ in range(3)]) == [[0, 1], [4, 5], [8, 9]]
    with pytest.raises(DataError, match=r"^sample 13 cannot be read; copy the data again$"):
        next(batches)


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    batches = loader(Slow(), num_workers=1, stop_sample=96)
    worker = int(next(batches)["pid"][0])
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(PlatformError, match="data loader process died"):
        numbers(batches)


class Slow(Numbers):
    """Takes its time, so that a worker is still busy when the test signals it."""

    def __getitem__(self, number: int) -> Any:
        time.sleep(0.005)
        return super().__getitem__(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_ignore_signals_that_their_parent_did_not_send(number: int) -> None:
    expected = numbers(loader(stop_sample=96))
    batches = loader(Slow(), num_workers=2, stop_sample=96)
    first = next(batches)
    # from another process: workers hear their parent, who ends one that hangs
    subprocess.run([sys.executable, "-c", f"import os; os.kill({int(first['pid'][0])}, {int(number)})"], check=True)
    assert numbers([first, *batches]) == expected


def test_a_worker_that_hangs_does_not_hang_the_end_of_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], timeout=60, check=False)
    assert done.returncode == 0


def test_close_ends_the_workers() -> None:
    with loader(Slow(), num_workers=1, stop_sample=96) as batches:
        worker = int(next(batches)["pid"][0])
        assert alive(worker)
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
    assert list(batches) == []


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


HANGING = """
import numpy as np, time
from megalm.data.loader import build_loader
from megalm.data.samples.sample import Sample
from megalm.data.samples.stream import StreamDataset

class Numbers:
    def __len__(self): return 1000
    def __getitem__(self, number):
        time.sleep(3600 * (number > 0))
        return Sample(number, 0, np.asarray([number]))

batches = build_loader(Numbers(), lambda s: {"n": s.tokens}, micro_batch_size=1, global_batch_size=1, start_sample=0,
    stop_sample=1000, rank=0, size=1, num_workers=1)
next(batches)
"""

ORPHAN = """
import os, signal, numpy as np
from megalm.data.loader import build_loader
from megalm.data.samples.sample import Sample
from megalm.data.samples.stream import StreamDataset

class Numbers:
    def __len__(self): return 1000
    def __getitem__(self, number): return Sample(number, 0, np.asarray([number]))

batches = build_loader(Numbers(), lambda s: {"pid": np.int64(os.getpid())}, micro_batch_size=1, global_batch_size=1,
    start_sample=0, stop_sample=1000, rank=0, size=1, num_workers=1)
print(int(next(batches)["pid"][0]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_within_seconds_when_their_parent_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 3
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(done.stdout))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_hold_the_dataset_of_each_sample(num_workers: int) -> None:
    batches = list(loader(dataset_ids=True, num_workers=num_workers))
    assert [batch["dataset_id"].tolist() for batch in batches] == [
        [number % 3 for number in row] for row in numbers(batches)
    ]
    assert batches[0]["dataset_id"].dtype == torch.int64
    assert next(loader()).get("dataset_id") is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_know_their_samples_and_have_seeds_by_the_first_one(num_workers: int) -> None:
    batches = list(loader(rank=1, start_sample=8, seed=5, num_workers=num_workers))
    assert [list(batch.numbers) for batch in batches] == numbers(batches) == [[10, 11], [14, 15], [18, 19], [22, 23]]
    assert [batch.seed for batch in batches] == [stable_seed(5, "dropout", first) for first in (10, 14, 18, 22)]
    assert next(loader()).seed is None, "an evaluation draws nothing"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pid": ((), "int64")}, r"function gives int64 \[1\] as tokens where its `fields` say nothing"),
        (
            {"tokens": ((2,), "int64"), "pid": ((), "int64")},
            r"int64 \[1\] as tokens where its .* int64 \[2\]",
        ),
        ({"tokens": ((1,), "int64"), "pid": ((), "int32")}, "int64 .* as pid where its `fields` say int32"),
        ({"tokens": ((1,), "int64"), "pid": ((), "int64"), "mask": ((1,), "bool")}, "gives nothing as mask"),
    ],
)
def test_an_example_that_is_not_what_its_objective_states_is_an_error(
    fields: Any, message: str, num_workers: int
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(loader(fields=fields, num_workers=num_workers))
    assert len(list(loader(fields={"tokens": ((1,), np.int64), "pid": ((), np.int64)}, num_workers=num_workers))) == 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_that_the_vocabulary_lacks_is_told_by_one_rank_of_each_copy(
    make_dataset: Any, num_workers: int
) -> None:
    indexed = make_dataset([8] * 100, vocab_size=700)
    indexed.vocab_size = 600
    dataset = StreamDataset(indexed, range(100), 8, 90, seed=1)
    for speaks in (True, False):
        batches = loader(dataset, num_workers=num_workers, stop_sample=88, speaks=speaks)
        with pytest.raises(DataError, match=r"token id 6\d\d at position \d of document \d+ is outside 0") as caught:
            list(batches)
        assert caught.value.silent is not speaks


def test_a_mapped_file_that_was_cut_is_told_from_a_lack_of_memory() -> None:
    batches = loader(Slow(), num_workers=1, stop_sample=96)
    os.kill(int(next(batches)["pid"][0]), signal.SIGBUS)
    with pytest.raises(PlatformError, match="a file that it had mapped was cut"):
        numbers(batches)
