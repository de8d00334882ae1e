"""Every fused operator beside torch eager and torch.compile's code for the same formula; on GPUs Liger and Apex too.

    python benchmarks/kernels.py                    # or: make bench-kernels; on the GPU where there is one
    python benchmarks/kernels.py --only norm --tokens 4096

All sides of an operator take turns in one process (A B B A ...): medians, and the median of the ratios. "of copy" is
the traffic that the operator cannot do without (each input read once, each result written once) over its time, as a
share of the bandwidth of a large copy, measured in between. A row ending in "+ backward" is both passes. Peers that
are not installed are left out.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import torch
from operators import OPERATORS, SIZES, Case, size_of

from megalm.engine.host_memory import FreedMemory
from megalm.kernels.building import library

LEAST_SAMPLE_S = 0.03


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Mean time of some calls in a row."""
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


def wait() -> None:
    """Until the device has done what was asked."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth() -> Callable[[], float]:
    """Measures bytes/s, read and written, of a copy far larger than any cache."""
    source = torch.zeros(2**28 if torch.get_default_device().type == "cuda" else 2**26)
    target = torch.empty_like(source)
    return lambda: 2 * size_of((source,)) / seconds(lambda: target.copy_(source), 1)


def measure(case: Case, rounds: int, bandwidth: Callable[[], float]) -> dict[str, float]:
    """Median time of every side, of the paired ratios to megalm's ("x side"), and the share of the copy bandwidth."""
    for call in case.sides.values():
        call()
        call()
    quickest = min(seconds(call, 1) for call in case.sides.values())
    repeats = max(1, math.ceil(LEAST_SAMPLE_S / max(quickest, 1e-7)))
    times: dict[str, list[float]] = {side: [] for side in case.sides}
    copies = []
    order = list(case.sides.items())
    for _ in range(rounds):
        copies.append(bandwidth())
        for side, call in order:
            call()  # what the side before it left in the caches is not its own
            times[side].append(seconds(call, min(repeats, 200)))
        order.reverse()
    found = {side: statistics.median(values) for side, values in times.items()}
    own = times["megalm"]
    for side, values in times.items():
        found[f"x {side}"] = statistics.median(b / a for a, b in zip(own, values, strict=True))
    found["of copy"] = case.moved / found["megalm"] / statistics.median(copies)
    return found


def report(case: Case, found: dict[str, float]) -> str:
    """A row of the table."""
    others = "".join(
        f"{side} {found[side] * 1e3:.2f} ms {found[f'x {side}']:.2f}x; " for side in case.sides if side != "megalm"
    )
    return (
        f"| {case.name} | {found['megalm'] * 1e3:.2f} | {case.moved / found['megalm'] / 1e9:.1f} | "
        f"{found['of copy']:.2f} | {others[:-2]} |"
    )


def machine(device: str) -> str:
    """Date, processor and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{datetime.now(UTC):%Y-%m-%d}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    """The CPU's own name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(SIZES), default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=tuple(OPERATORS), default=tuple(OPERATORS))
    parser.add_argument("--tokens", type=int, help="rows of most operands (default: 16384 on CPUs, 32768 on GPUs)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's code out")
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeed's CPU Adam too: compiled at first use")
    arguments = parser.parse_args()
    if arguments.tokens is not None and (arguments.tokens < 2048 or arguments.tokens % 2048):
        parser.error(f"--tokens {arguments.tokens} must be a positive multiple of 2048")
    FreedMemory(arguments.device == "cpu")  # so that no side's time is that of the system's new pages
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    loaded = library.load("fused", arguments.device)
    sizes = replace(
        SIZES[arguments.device],
        deepspeed=arguments.deepspeed and arguments.device == "cpu",
        compiled=not arguments.no_compile,
    )
    if arguments.tokens is not None:
        sizes = replace(sizes, tokens=arguments.tokens, loss_tokens=min(sizes.loss_tokens, arguments.tokens))
    torch.set_default_device(arguments.device)
    bandwidth = copy_bandwidth()
    print(f"{machine(arguments.device)}; {loaded.reason}; {arguments.dtype}; copy {bandwidth() / 1e9:.1f} GB/s\n")
    print("| operator | ms | GB/s | of copy | the same by others, and how much slower than megalm |")
    print("|---|---|---|---|---|")
    for name in arguments.only:
        for case in OPERATORS[name](sizes, getattr(torch, arguments.dtype)):
            if arguments.no_compile:
                case.sides.pop("compiled", None)
            print(report(case, measure(case, arguments.rounds, bandwidth)), flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
