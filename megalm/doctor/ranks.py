"""What the ranks of a job have in common and how fast they talk; every rank calls `rank_rows`."""

import contextlib
import platform
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm import __version__
from megalm.distributed.environment import LaunchEnvironment, choose_accelerator, prepare_process
from megalm.doctor.machine import GIB, Row
from megalm.storage.durable import replace_text
from megalm.storage.faults import reason_of

_TIMEOUT_MINUTES = 3.0
_MIB = 1 << 20


def rank_rows(environment: LaunchEnvironment, folder: Path) -> list[Row]:
    """Join the ranks, compare and measure them; the rows, on every rank.

    Raises:
        PlatformError: the ranks do not find each other, or there are more of them on a node than GPUs.
    """
    threads = prepare_process(environment)
    import torch

    from megalm.distributed.collectives import gather_json
    from megalm.distributed.process_group import default_backend, rank_device, start_process_group, stop_process_group

    torch.set_num_threads(threads)
    backend = default_backend()
    choose_accelerator(backend == "nccl")
    device = rank_device(environment, backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    begin = time.monotonic()
    start_process_group(environment, backend, _TIMEOUT_MINUTES)
    met_s = time.monotonic() - begin
    facts: list[dict[str, Any]] = gather_json(_facts(environment, str(torch.__version__)), device)
    rows = [
        Row("meeting", f"{environment.master_addr}:{environment.master_port}, {backend}, rank 0 waited {met_s:.1f} s"),
        *_alike(facts),
        *_places(facts),
        *_clocks(device),
        *_shared_folder(environment, folder, device),
        *_all_reduce(device),
    ]
    stop_process_group()
    return rows


def _facts(environment: LaunchEnvironment, torch_version: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "local": (environment.local_rank, environment.local_world_size),
        "megalm": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "torch": torch_version,
    }


def _alike(facts: list[dict[str, Any]]) -> Iterator[Row]:
    """Versions that must be equal on all ranks."""
    for name in ("megalm", "python", "torch"):
        found = Counter(fact[name] for fact in facts)
        if len(found) == 1:
            yield Row(name, f"{next(iter(found))} on all ranks")
            continue
        text = "; ".join(f"{value} on ranks {_ranks(facts, name, value)}" for value in found)
        yield Row(name, text, "the ranks must run the same installation: share the environment between the nodes")


def _ranks(facts: list[dict[str, Any]], name: str, value: str) -> str:
    ranks = [str(rank) for rank, fact in enumerate(facts) if fact[name] == value]
    return ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")


def _places(facts: list[dict[str, Any]]) -> Iterator[Row]:
    """How the ranks are spread over hosts."""
    hosts = Counter(fact["host"] for fact in facts)
    shown = ", ".join(f"{host} x {count}" for host, count in list(hosts.items())[:8])
    yield Row("ranks", f"{len(facts)} on {len(hosts)} hosts: {shown}{', ...' if len(hosts) > 8 else ''}")


def _clocks(device: Any) -> Iterator[Row]:
    """The spread of the wall clocks, read as all ranks leave a barrier."""
    import torch.distributed as dist

    from megalm.distributed.collectives import gather_json

    dist.barrier()
    times = gather_json(time.time(), device)
    spread = max(times) - min(times)
    advice = "log lines of different nodes will not sort: synchronise the clocks" if spread > 2 else ""
    yield Row("clocks", f"within {spread * 1000:.0f} ms of each other", advice, fatal=False)


def _shared_folder(environment: LaunchEnvironment, folder: Path, device: Any) -> Iterator[Row]:
    """Every rank writes a file and must see those of all others."""
    import torch.distributed as dist

    from megalm.distributed.collectives import gather_json

    name = gather_json(uuid.uuid4().hex, device)[0]
    own = folder / f".megalm-doctor-{name}-{environment.rank}"
    error = ""
    try:
        replace_text(own, str(environment.rank))
    except OSError as problem:
        error = f"rank {environment.rank} on {socket.gethostname()} cannot write: {reason_of(problem, own)}"
    dist.barrier()
    deadline = time.monotonic() + 10.0  # what another node wrote may be seen late on a network file system
    unseen = set(range(environment.world_size))
    while unseen and not error and time.monotonic() < deadline:
        unseen = {rank for rank in unseen if not own.with_name(f".megalm-doctor-{name}-{rank}").exists()}
        time.sleep(0.1 if unseen else 0)
    if unseen and not error:
        error = f"rank {environment.rank} on {socket.gethostname()} does not see what rank {min(unseen)} wrote"
    errors = gather_json(error, device)
    with contextlib.suppress(OSError):
        own.unlink()
    found = next((text for text in errors if text), "")
    advice = "; all nodes must share the run folder: choose one with --folder" if found else ""
    yield Row("folder", f"{folder} is the same on all ranks" if not found else str(folder), found + advice)


def _all_reduce(device: Any) -> Iterator[Row]:
    """Bandwidth of all-reduce (bus bandwidth as nccl-tests define it: 2 (n - 1) / n x bytes / time), sums checked."""
    import torch
    import torch.distributed as dist

    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        yield Row("all-reduce", "one rank: nothing to measure; start with srun, mpirun or torchrun")
        return
    for count_bytes in (4096, _MIB, 256 * _MIB if device.type == "cuda" else 32 * _MIB):
        times = []
        for _ in range(4):
            tensor = torch.full((count_bytes // 4,), float(rank + 1), device=device)
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        wrong = not bool((tensor == size * (size + 1) / 2).all())
        slowest = torch.tensor([min(times[1:]), float(wrong)], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds, wrong = float(slowest[0]), bool(slowest[1])
        bandwidth = 2 * (size - 1) / size * count_bytes / seconds / GIB
        named = f"{count_bytes // _MIB} MiB" if count_bytes >= _MIB else f"{count_bytes // 1024} KiB"
        yield Row("all-reduce", f"{named} in {seconds * 1000:.2f} ms, {bandwidth:.2f} GiB/s bus",
                  "the sum is wrong: the network or a device damages data" if wrong else "")  # fmt: skip
