"""How much memory tensors take on the CPU, allocation by allocation.

The process's own figures cannot say it: they hold the interpreter and the libraries, and what the allocator keeps.
torch's profiler is told of every block that the CPU allocator gives and takes back, temporary ones of operators too.
It hears of the calling thread's blocks only: one that a thread of the communication library is the last to let go of
counts until its address is given again. So a measurement may be too high, never too low; of several the
lowest is right.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class TensorMemory:
    """Between enter and exit, the bytes of tensors on the CPU that were made in between.

    Costs some microseconds an operator and memory for each event: for measurements, not for training.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self.peak_bytes = 0
        """The most that was alive at one time."""
        self.final_bytes = 0
        """What is alive at exit."""

    def __enter__(self) -> "TensorMemory":
        self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        alive: dict[int, int] = {}
        for event in sorted(_allocations(results.experimental_event_tree()), key=lambda event: event.start_time_ns):
            block = event.extra_fields
            self.final_bytes -= alive.pop(block.ptr, 0)
            if block.alloc_size > 0:
                alive[block.ptr] = block.alloc_size
                self.final_bytes += block.alloc_size
            self.peak_bytes = max(self.peak_bytes, self.final_bytes)


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    """Blocks that were given and taken back, of `events` and those inside them."""
    waiting = [*reversed(events)]
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            yield event
        waiting += reversed(event.children)
