"""What one machine can do: versions, compilers, kernels, folders, ports, limits, schedulers; each a row of a page."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from megalm import __version__
from megalm.distributed.environment import captured_environment
from megalm.distributed.network import free_port, listens
from megalm.storage.faults import reason_of

GIB = 1 << 30
_SHOWN_VARIABLES = ("NCCL_", "UCX_", "GLOO_", "FI_", "OMP_", "CUDA_", "MEGALM_", "LD_LIBRARY_PATH", "PYTHONPATH")
_LOCAL_FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs")


@dataclass(frozen=True)
class Row:
    """One finding: what was looked at, what is there, and if that is no good, what to do."""

    name: str
    text: str
    problem: str = ""
    """What is wrong and how to mend it; "" if nothing is."""
    fatal: bool = True
    """Whether training cannot work so; else it is a warning."""

    @property
    def mark(self) -> str:
        """The word before the row."""
        return "ok" if not self.problem else "FAIL" if self.fatal else "warn"


def machine_rows(folder: Path) -> list[Row]:
    """Every row about this machine; a check that itself fails is a row that says so."""
    checks: tuple[Callable[[], Iterator[Row]], ...] = (
        versions, hardware, compilers, kernels, lambda: storage(folder), shared_memory, limits, network, clock, slurm,
        mpi, variables,
    )  # fmt: skip
    rows: list[Row] = []
    for check in checks:
        try:
            rows += check()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            name = getattr(check, "__name__", "storage").strip("<>")
            rows.append(Row(name, "", f"the check itself failed: {error}", fatal=False))
    return rows


def versions() -> Iterator[Row]:
    """megalm, Python and the packages that matter."""
    yield Row("megalm", f"{__version__}, Python {platform.python_version()} at {sys.executable}")
    yield Row("system", f"{platform.platform()} on {socket.gethostname()}")
    for name, needed in (("torch", True), ("deepspeed", True), ("mpi4py", False), ("transformers", False)):
        try:
            yield Row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "not installed", f"pip install {name}" if needed else "")


def hardware() -> Iterator[Row]:
    """Processor, memory, GPUs and NCCL."""
    import torch

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    yield Row("processor", f"{cores} of {os.cpu_count()} cores usable, {memory.total / GIB:.1f} GiB memory, "
              f"{memory.available / GIB:.1f} free")  # fmt: skip
    if not torch.cuda.is_available():
        why = "this torch has no CUDA" if torch.version.cuda is None else "no GPU or driver is visible"
        lost = "a GPU is here (nvidia-smi), but torch cannot use it: install a torch for its CUDA"
        yield Row("GPU", f"none ({why}); training runs on the CPU", lost if shutil.which("nvidia-smi") else "", False)
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Row("GPU", f"{len(names)} x {', '.join(sorted(set(names)))}, CUDA {torch.version.cuda} of torch")
    yield Row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def compilers() -> Iterator[Row]:
    """The C++ and CUDA compilers that build kernels."""
    import torch

    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    text = _first_line(compiler, "--version") if compiler else "none"
    yield Row(
        "C++ compiler", text, "" if compiler else "install g++: DeepSpeed builds its CPU optimizers with it", False
    )
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.defpath}") or shutil.which("ninja")
    yield Row("ninja", ninja or "none", "" if ninja else "pip install ninja: kernels are built with it", False)
    if shutil.which("nvcc"):
        release = next((line for line in _lines("nvcc", "--version") if "release" in line), "unknown release")
        other = torch.version.cuda is not None and f"release {torch.version.cuda}" not in release
        problem = (
            f"torch was built with CUDA {torch.version.cuda}: DeepSpeed refuses to build CUDA code" if other else ""
        )
        yield Row("nvcc", release.strip(), problem, False)
    else:
        lost = "install the CUDA toolkit: kernels for the GPU cannot be built" if torch.cuda.is_available() else ""
        yield Row("nvcc", "none", lost, False)


def kernels() -> Iterator[Row]:
    """Which implementation of the operators a run would use here; builds the fused one if this machine has not yet."""
    import torch

    from megalm.kernels import apex
    from megalm.kernels.building import library

    live = library.load("auto", "cuda" if torch.cuda.is_available() else "cpu")
    yield Row("kernels", live.reason, "" if live.fused else "slower, with equal results", False)
    reason = apex.missing()
    yield Row("apex", "NVIDIA's" if reason is None else f"not used: {reason} (not needed)")


def storage(folder: Path) -> Iterator[Row]:
    """The folder of runs: writable, with atomic renames, and how fast a small file is on disk."""
    try:
        seconds = _probe(folder)
    except OSError as error:
        yield Row("folder", str(folder), f"cannot be written: {reason_of(error, folder)}; choose another with --folder")
        return
    free = shutil.disk_usage(folder).free
    kind = _file_system(folder)
    text = f"{folder} on {kind}, {free / GIB:.1f} GiB free, write+fsync+rename+read in {seconds * 1000:.1f} ms"
    if free < 2 * GIB:
        yield Row("folder", text, "little room: a checkpoint needs 12 bytes a parameter", False)
    elif seconds > 2:
        yield Row("folder", text, "slow: every checkpoint waits for it", False)
    else:
        local = kind in _LOCAL_FILE_SYSTEMS
        yield Row("folder", text + (" (a local file system: good for one node only)" if local else ""))


def _probe(folder: Path) -> float:
    """Seconds to write, flush, rename and read back a small file."""
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".megalm-doctor-", delete=False) as stream:
        path, moved = Path(stream.name), Path(stream.name + ".moved")
        try:
            stream.write(b"megalm")
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(path, moved)
            if moved.read_bytes() != b"megalm":
                raise OSError(5, "what was written is not what is read")
        finally:
            path.unlink(missing_ok=True)
            moved.unlink(missing_ok=True)
    return time.monotonic() - begin


def _file_system(folder: Path) -> str:
    """The type of the file system under a folder."""
    found = [disk for disk in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(disk.mountpoint)]
    return max(found, key=lambda disk: len(disk.mountpoint)).fstype if found else "unknown"


def shared_memory() -> Iterator[Row]:
    """/dev/shm, through which the workers of a data loader and NCCL hand over memory."""
    if not Path("/dev/shm").is_dir():
        yield Row("/dev/shm", "none", "mount a tmpfs there: data loader workers and NCCL need it")
        return
    usage = shutil.disk_usage("/dev/shm")
    small = "less than 1 GiB is free: start the container with a larger --shm-size, or remove files left there"
    yield Row("/dev/shm", f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free",
              small if usage.free < GIB else "", False)  # fmt: skip


def limits() -> Iterator[Row]:
    """ulimits."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Row("open files", _limit(files), "ulimit -n 65536: each rank holds sockets to all others" if 0 <= files < 4096
              else "", False)  # fmt: skip
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    yield Row("locked memory", _limit(locked), "ulimit -l unlimited: InfiniBand registers memory" if infiniband and
              locked != resource.RLIM_INFINITY else "", False)  # fmt: skip
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    yield Row("processes", f"{_limit(processes)}, core files {_limit(core)}")


def network() -> Iterator[Row]:
    """Addresses of this machine, and whether the usual port is free."""
    cards = [
        f"{name} {entry.address}"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    yield Row("network", ", ".join(cards))
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        loopback = " (the loopback: other nodes need another name for this machine)" if address[:4] == "127." else ""
        yield Row("host name", f"{host} is {address}{loopback}")
    except OSError:
        yield Row("host name", f"{host} has no address: between nodes gloo takes the interface that leads to the first")
    if listens(29500):
        yield Row("ports", "29500 is taken", "give another: --master_port (deepspeed), --master-port (torchrun)", False)
    else:
        yield Row("ports", f"29500 is free, {free_port('127.0.0.1')} too")


def clock() -> Iterator[Row]:
    """The wall clock, which names log lines; nothing in a run depends on it."""
    synchronised = (
        _first_line("timedatectl", "show", "--property", "NTPSynchronized") if shutil.which("timedatectl") else ""
    )
    state = {"NTPSynchronized=yes": ", synchronised", "NTPSynchronized=no": ", not synchronised"}.get(synchronised, "")
    yield Row("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()) + state)


def slurm() -> Iterator[Row]:
    """Whether jobs can be submitted here, and to what."""
    if shutil.which("sinfo") is None:
        yield Row("SLURM", "not installed")
        return
    version = _first_line("sinfo", "--version")
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%P %a %D x %c cores %G"], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        yield Row("SLURM", version, "the controller does not answer (scontrol ping)", False)
    else:
        yield Row("SLURM", f"{version}; " + "; ".join(done.stdout.split("\n")[:-1]))


def mpi() -> Iterator[Row]:
    """The MPI launcher."""
    launcher = shutil.which("mpirun")
    yield Row("MPI", f"{_first_line('mpirun', '--version')} at {launcher}" if launcher else "no mpirun")


def variables() -> Iterator[Row]:
    """Variables that change how ranks talk; secrets are not among them."""
    found = [f"{name}={value}" for name, value in sorted(captured_environment().items())
             if name.startswith(_SHOWN_VARIABLES)]  # fmt: skip
    yield Row("variables", " ".join(found) or "none set")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _lines(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout or done.stderr).strip().splitlines()


def _first_line(*command: str) -> str:
    return next(iter(_lines(*command)), "")
