"""Speed between two log lines: seconds per step, tokens and model FLOPs per second."""

import resource
import sys
import time

import torch


class Throughput:
    """Clocks steps with the monotonic clock; evaluation and saving are taken out by `pause` and `resume`."""

    def __init__(self, flops_per_token: float, ranks: int) -> None:
        self._flops_per_token, self._ranks = flops_per_token, ranks
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._begin = time.monotonic()
        self._paused = 0.0
        self._wait = 0.0
        self._steps = 0
        self._tokens = 0

    def pause(self) -> None:
        """What follows is no training."""
        self._pause_begin = time.monotonic()

    def resume(self) -> None:
        """Training goes on."""
        self._paused += time.monotonic() - self._pause_begin

    def add(self, tokens: int, data_wait_s: float) -> None:
        """One more step is done."""
        self._steps += 1
        self._tokens += tokens
        self._wait += data_wait_s

    def read(self) -> dict[str, float]:
        """iteration_time_s, tokens_per_s, tflops_per_rank and data_wait_s (per step) of the interval so far."""
        elapsed = max(time.monotonic() - self._begin - self._paused, 1e-9)
        return {
            "iteration_time_s": elapsed / self._steps,
            "tokens_per_s": self._tokens / elapsed,
            "tflops_per_rank": self._tokens / elapsed * self._flops_per_token / self._ranks / 1e12,
            "data_wait_s": self._wait / self._steps,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held: of the GPU, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
