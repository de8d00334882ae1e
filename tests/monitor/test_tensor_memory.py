"""The memory that tensors take is counted block by block."""

import torch

from megalm.monitor.tensor_memory import TensorMemory

MIB = 2**20


def test_peak_and_rest_are_those_of_the_tensors() -> None:
    with TensorMemory() as memory:
        kept = torch.empty(MIB)
        gone = torch.empty(3 * MIB)
        del gone
        both = torch.empty(MIB) + kept  # the first addend is let go of afterwards
    assert memory.peak_bytes == 4 * 4 * MIB
    assert memory.final_bytes == 2 * 4 * MIB
    assert both.numel() == kept.numel()


def test_work_space_of_operators_counts() -> None:
    rows = torch.ones(1024, 2048)[:, :2000]
    with TensorMemory() as memory:
        torch.log_softmax(rows, -1)
    assert memory.peak_bytes > rows.numel() * 4 * 1.5, "the kernel makes a contiguous copy beside its result"
    assert memory.final_bytes == 0
