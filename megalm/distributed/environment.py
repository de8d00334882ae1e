"""What the launcher tells a process about its rank in the job. The only reader of `os.environ` in megalm.

In the order of precedence: the variables of torchrun and the deepspeed launcher (RANK, WORLD_SIZE, ...), those of an
MPI launcher, those of `srun`, a single process. Where two of them speak, they must agree.
"""

import os
import re
import socket
import time
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace

from megalm.distributed import mpi, slurm
from megalm.distributed.network import check_interfaces, interface_towards, interfaces
from megalm.errors import PlatformError
from megalm.secrets import is_secret

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_CAPTURED = (
    "PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV",
    "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED", "SLURM_CONF", "XDG_CACHE_HOME", "TMPDIR", "LD_PRELOAD", "CC",
    "CXX", "TOKENIZERS_PARALLELISM", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
_AGREED = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_COLLNET_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS",
    "NCCL_BUFFSIZE", "NCCL_NTHREADS", "NCCL_P2P_LEVEL", "NCCL_CUMEM_ENABLE", "NCCL_NET", "NCCL_IB_DISABLE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_DISTRIBUTED_DEBUG", "DS_ACCELERATOR",
    "PYTORCH_TUNABLEOP_ENABLED", "ONEDNN_DEFAULT_FPMATH_MODE",
)  # fmt: skip
_CAPTURED_PREFIXES = (
    "UCX_", "FI_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NVTE_", "ROCM_",
    "HIP_", "HSA_", "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_", "TIKTOKEN_",
)  # fmt: skip
_CAPTURED_FAMILIES = {
    "NCCL_": "ALGO ASYNC BLOCKING BUFFSIZE CGA CHECK CHECKS COLLNET COMM CONF CREATE CROSS CTA CUMEM DEBUG DMABUF GDR "
    "GDRCOPY GIN GRAPH HOSTID IB IGNORE LAUNCH LL LL128 LOCAL MAX MIN MNNVL NCHANNELS NET NSOCKS NTHREADS NVB NVLS "
    "NVLSTREE OOB P2P PAT PROFILER PROGRAM PROTO PXN RAS RUNTIME SET SHM SINGLE SOCKET SPLIT STORE SYM THREAD TOPO "
    "TREE TUNER UNPACK WIN WORK",
    "GLOO_": "SOCKET DEVICE",
    "DS_": "ACCELERATOR BUILD ENABLE IGNORE SKIP",
    "HF_": "ASSETS DATASETS ENDPOINT EVALUATE HOME HUB MODULES XET",
    "MEGALM_": "SITE",
}
"""Prefix -> the words that follow it in variables that are known: people use these prefixes for their own too."""
_CHOSEN_BY_SLURM = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_OF_THE_SESSION = re.compile(
    r"_|PWD|OLDPWD|SHLVL|USER|LOGNAME|SHELL|TERM\w*|COLOR\w*|LS_COLORS|LESS\w*|PAGER|MANPATH|INFOPATH|MAIL|HOST\w*|TZ|"
    r"EDITOR|VISUAL|HIST\w*|PS\d|PROMPT\w*|DISPLAY|XAUTHORITY|WINDOWID|TMUX\w*|STY|LINES|COLUMNS|LANGUAGE|LC_\w+|BASH\w*.*|"
    r"SSH_\w+|XDG_\w+|DBUS_\w+|GPG_\w+|GNOME_\w+|KDE_\w+|VSCODE_\w+|CONDA_\w+|_CE_\w+|PYENV_\w+|PIP_\w+|NVM_\w+|MODULE\w+|"
    r"__?LMOD\w+|_ModuleTable\w+|LMOD_\w+|LOADEDMODULES|_LMFILES_|SLURM_\w+|SBATCH_\w+|SQUEUE_\w+|SINFO_\w+|PYTEST_\w+|"
    r"DEBIAN_FRONTEND|I_MPI_\w+|OMPI_\w+|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT",
)
"""What a shell sets for itself or for its user, and no job needs."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """One process of a job, and where the job's ranks meet."""

    launcher: str
    """deepspeed, torchrun, mpirun, srun, or none for a single process."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    other_ports: tuple[int, ...] = ()
    """Where else the ranks may meet if somebody else listens on master_port; only if megalm chose it."""
    job: str = ""
    """What tells this job from others on the same ports; "" if nothing does."""
    agent_store: bool = False
    """The launcher itself keeps the store in which the ranks meet, as torchrun does."""
    restart: int = 0
    """How often the launcher has started this job before (a requeued job, ranks that torchrun started again)."""
    note: str = ""
    """What the user should know about how the process was started."""

    @classmethod
    def alone(cls, note: str = "") -> "LaunchEnvironment":
        """A single process without a launcher."""
        return cls(
            launcher="none",
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr="127.0.0.1",
            master_port=0,
            note=note,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that speaks for the job."""
        return self.rank == 0

    @property
    def on_loopback(self) -> bool:
        """Whether the ranks meet on this machine only."""
        return self.master_addr in _LOOPBACK


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """The launch environment of this process. Under mpirun the ranks exchange where they meet, once.

    Raises:
        PlatformError: incomplete or contradictory variables, or many tasks that do not know of each other.
    """
    environ = os.environ if environ is None else environ
    check_interfaces(environ)
    found = _read(environ)
    counts = [environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return replace(found, restart=sum(int(count) for count in counts if count.isdigit()))


def _read(environ: Mapping[str, str]) -> LaunchEnvironment:
    family, in_step = mpi.family_of(environ), _in_step(environ)
    if family is not None and slurm.in_step(environ) and _is_srun_itself(family, environ):
        family = None
    given = [name for name in _RANK_VARIABLES if name in environ]
    scheduled = in_step or family is not None
    if given and not (scheduled and len(given) < len(_RANK_VARIABLES)):
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
        found = _from_variables(environ, launcher)
        _check_one_job(found, environ)
        return found
    if scheduled:
        found = _from_slurm(environ) if family is None else _from_mpi(environ, family)
        _check_given(found, environ, given)
        return found
    present = [name for name in _MEETING_VARIABLES if name in environ]
    if present:
        raise _incomplete(present, [*_RANK_VARIABLES, *(n for n in _MEETING_VARIABLES if n not in environ)])
    return _single_process(environ)


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task of srun; a shell that `srun --pty` gave to a user is none."""
    return slurm.in_step(environ) and not slurm.in_interactive_shell(environ)


def _check_given(launch: LaunchEnvironment, environ: Mapping[str, str], given: list[str]) -> None:
    """What tutorials export beside srun or mpirun (WORLD_SIZE, RANK) must be what these say.

    Raises:
        PlatformError: it is not.
    """
    told = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": launch.local_rank}
    for name in given:
        if _integer(environ, name) != told[name]:
            refused = PlatformError(
                f"{name}={environ[name]} in the environment, but {launch.launcher} says {told[name]}; unset RANK, "
                "WORLD_SIZE and LOCAL_RANK: megalm reads the variables of srun and mpirun itself"
            )
            refused.silent = launch.rank > 0
            raise refused


def _from_variables(environ: Mapping[str, str], launcher: str) -> LaunchEnvironment:
    """What RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say."""
    names = (*_RANK_VARIABLES, *_MEETING_VARIABLES)
    missing = [name for name in names if name not in environ]
    if missing:
        raise _incomplete([name for name in names if name in environ], missing)
    rank, world_size, local_rank, port = (
        _integer(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not 0 <= rank < world_size:
        raise PlatformError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={world_size}; fix the launch command")
    if not 0 <= port < 65536:
        raise PlatformError(f"MASTER_PORT={port} must be below 65536; fix the launch command")
    local_size_name = "LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE"
    local_world_size = _integer(environ, local_size_name) if local_size_name in environ else world_size
    if not 0 <= local_rank < local_world_size:
        raise PlatformError(
            f"LOCAL_RANK={local_rank} must be at least 0 and below {local_size_name}={local_world_size}; "
            "fix the launch command"
        )
    if local_world_size > world_size:
        raise PlatformError(
            f"{local_size_name}={local_world_size} must not exceed WORLD_SIZE={world_size}; fix the launch command"
        )
    return LaunchEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environ["MASTER_ADDR"],
        master_port=port,
        agent_store=launcher == "torchrun" and environ.get("TORCHELASTIC_USE_AGENT_STORE", "True") == "True",
    )


def _from_slurm(environ: Mapping[str, str]) -> LaunchEnvironment:
    """A task of srun. MASTER_ADDR and MASTER_PORT count if the batch script sets them; else the job tells."""
    variables = slurm.launch_variables(environ)
    ports: tuple[int, ...] = (0,)
    if slurm.num_tasks(environ) > 1:
        variables["MASTER_ADDR"] = environ.get("MASTER_ADDR") or slurm.meeting_address(environ)
        ports = () if environ.get("MASTER_PORT") else slurm.meeting_ports(environ)
    else:
        variables["MASTER_ADDR"] = "127.0.0.1"
    if ports:
        variables["MASTER_PORT"] = str(ports[0])
    launch = _from_variables({**environ, **variables}, "srun")
    return replace(launch, other_ports=ports[1:], job=slurm.job_name(environ) if ports else "")


def _from_mpi(environ: Mapping[str, str], family: mpi.MpiVariables) -> LaunchEnvironment:
    """A rank of mpirun; where the ranks meet is exchanged through mpi4py unless the command line says it."""
    size = _integer(environ, family.size) if family.size in environ else None
    if _in_step(environ) and size is not None and size < slurm.num_tasks(environ):
        raise PlatformError(
            f"{family.size}={size} in a step of SLURM_STEP_NUM_TASKS={slurm.num_tasks(environ)} tasks: each task would "
            "train alone; run mpirun once, in the batch script, or let srun start the ranks itself"
        )
    if size == 1:
        return _single_process(environ)
    told = all(environ.get(name) for name in _MEETING_VARIABLES)
    if told and all(name in environ for name in family[1:]):
        names = dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"), family[1:], strict=True))
        given = {name: environ[source] for name, source in names.items()}
        return _from_variables({**environ, **given}, "mpirun")
    if environ is os.environ:
        os.environ.update(mpi.library_choice(family, environ))
    found = mpi.discover(family, environ, next(iter(interfaces(environ)), None))
    given = {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.size),
        "LOCAL_RANK": str(found.local_rank),
        "LOCAL_SIZE": str(found.local_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or found.master_addr,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(found.master_port),
    }
    return _from_variables(given, "mpirun")


def _single_process(environ: Mapping[str, str]) -> LaunchEnvironment:
    tasks, step_tasks = environ.get("SLURM_NTASKS", "1"), environ.get("SLURM_STEP_NUM_TASKS", "1")
    note = ""
    if slurm.in_step(environ) and not _in_step(environ) and step_tasks != "1":
        note = (
            f"one process trains, though this shell belongs to a step of {step_tasks} tasks (srun --pty): the other "
            "tasks run no ranks. For more ranks leave the shell and let srun start them (srun python "
            "launch/pretrain_gpt.py ...), or start them here with torchrun --standalone --nproc-per-node N"
        )
    elif not _in_step(environ) and tasks.isdigit() and int(tasks) > 1:
        note = (
            f"one process trains, though this job has {tasks} tasks: inside a batch script or salloc, srun starts the "
            "ranks (srun python launch/pretrain_gpt.py ...)"
        )
    return LaunchEnvironment.alone(note)


def _is_srun_itself(family: mpi.MpiVariables, environ: Mapping[str, str]) -> bool:
    """Whether the MPI variables are srun's own (--mpi=pmi2, --mpi=pmix), not of an mpirun inside or above the step."""
    if family.rank not in ("PMI_RANK", "PMIX_RANK"):
        return False
    same_size = family.size not in environ or environ[family.size] == environ["SLURM_STEP_NUM_TASKS"]
    return same_size and environ[family.rank] == environ.get("SLURM_PROCID")


def _check_one_job(launch: LaunchEnvironment, environ: Mapping[str, str]) -> None:
    """A launcher inside the tasks of srun or mpirun joins them into one job.

    Raises:
        PlatformError: each task is a job of its own, or they contradict each other.
    """
    family = mpi.family_of(environ)
    if slurm.in_interactive_shell(environ):
        return
    if family is not None and family.size in environ:
        rank_name, size_name = family.rank, family.size
    elif slurm.in_step(environ) and "SLURM_PROCID" in environ:
        rank_name, size_name = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    else:
        return
    tasks, task = _integer(environ, size_name), _integer(environ, rank_name)
    nodes_name = "GROUP_WORLD_SIZE" if launch.launcher == "torchrun" else "CROSS_SIZE"
    problem = ""
    if nodes_name in environ:  # a launcher runs in each task, and starts ranks under it
        joined = _integer(environ, nodes_name)
        if joined != tasks and tasks > 1:
            problem = (
                f"{size_name}={tasks} tasks each run a launcher that knows of {nodes_name}={joined} of them: they "
                "would train apart; give torchrun --nnodes and --node-rank (one task a node), or start the ranks with "
                "srun or mpirun alone"
            )
    elif launch.world_size < tasks:
        problem = (
            f"WORLD_SIZE={launch.world_size} in each of {size_name}={tasks} tasks: each would train alone; unset RANK, "
            "WORLD_SIZE and LOCAL_RANK: megalm reads the variables of srun and mpirun itself"
        )
    elif launch.world_size == tasks and launch.rank != task:
        problem = (
            f"RANK={launch.rank} contradicts {rank_name}={task}; unset RANK, WORLD_SIZE and LOCAL_RANK: megalm reads "
            "the variables of srun and mpirun itself"
        )
    if problem:
        refused = PlatformError(problem)
        refused.silent = task > 0  # in each task the error is that of a rank 0
        raise refused


def _incomplete(present: list[str], missing: list[str]) -> PlatformError:
    return PlatformError(
        f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with "
        "`deepspeed launch/pretrain_gpt.py ...`, torchrun, srun or mpirun, or unset them to run one process"
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise PlatformError(f"{name}={environ[name]!r} in the environment must be a whole number") from None


DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
"""Variables under which cuBLAS and NCCL give the same bits each time; what the user set stays."""


def prepare_process(
    environment: LaunchEnvironment, environ: MutableMapping[str, str] | None = None, *, deterministic: bool = False
) -> int:
    """Set what torch and DeepSpeed read from the environment when they are imported; call before importing them.

    `deterministic`: also what makes libraries give the same bits each time.

    Returns:
        The number of CPU threads for this rank: OMP_NUM_THREADS if the user set it, else an equal share of the cores.
    """
    environ = os.environ if environ is None else environ
    for name, value in DETERMINISTIC.items() if deterministic else ():
        environ.setdefault(name, value)
    # deepspeed.comm falls back to MPI discovery unless all of these are set
    environ["RANK"] = str(environment.rank)
    environ["WORLD_SIZE"] = str(environment.world_size)
    environ["LOCAL_RANK"] = str(environment.local_rank)
    environ["MASTER_ADDR"] = environment.master_addr
    environ["MASTER_PORT"] = str(environment.master_port)
    if environment.on_loopback and "lo" in (name for _, name in socket.if_nameindex()):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens on whatever the host name resolves to
    elif (
        environment.world_size > environment.local_world_size
        and not interfaces(environ)
        and (interface := interface_towards(environment.master_addr))
    ):
        environ["GLOO_SOCKET_IFNAME"] = interface
    given = environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() and int(given) > 0 else 0
    if not threads:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        granted = environ.get("SLURM_CPUS_ON_NODE", "")  # not every SLURM binds a job to its share of the node
        cores = min(cores, int(granted)) if granted.isdigit() and int(granted) else cores
        threads = max(1, cores // environment.local_world_size)
        environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def choose_accelerator(cuda: bool, environ: MutableMapping[str, str] | None = None) -> None:
    """Tell DeepSpeed which accelerator to use, before it is imported (else it guesses and warns)."""
    environ = os.environ if environ is None else environ
    environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")


def seconds_since_start(environ: Mapping[str, str] | None = None) -> float:
    """The age of this process, or of the task of srun that it belongs to, whose launcher took its time too."""
    import psutil

    task = (os.environ if environ is None else environ).get("SLURM_TASK_PID", "")
    own = task.isdigit() and psutil.pid_exists(int(task))
    return time.time() - psutil.Process(int(task) if own else None).create_time()


def environment_with(before_path: str = "", **variables: str) -> dict[str, str]:
    """This process's environment with more variables, for a child process; `before_path` goes in front of PATH."""
    return {**os.environ, **variables, "PATH": before_path + os.environ.get("PATH", os.defpath)}


def user_variable(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """A variable by which the user tells megalm something; None if it is not set."""
    return (os.environ if environ is None else environ).get(name) or None


def variables_to_agree_on(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that change what is computed, or how the ranks communicate; they must be the same on all ranks."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in _AGREED if name in environ}


def environment_without(prefix: str, environ: Mapping[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """This process's environment without the variables that begin so, and the names of those."""
    environ = os.environ if environ is None else environ
    kept = {name: value for name, value in environ.items() if not name.startswith(prefix)}
    return kept, sorted(set(environ) - set(kept))


def captured_environment(environ: Mapping[str, str] | None = None, also: Collection[str] = ()) -> dict[str, str]:
    """The variables that a job needs to run like this shell, and those of the names in `also`.

    Never what looks like a secret, by name or by value, nor what SLURM chooses for each job.
    """
    environ = os.environ if environ is None else environ
    return {
        name: value
        for name, value in environ.items()
        if (_is_known(name) or name in also) and name not in _CHOSEN_BY_SLURM and not is_secret(name, value)
    }


def left_behind(captured: Collection[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """The names of this shell's variables that are not among those `captured`, without those of its session.

    What looks like a secret comes first.
    """
    environ = os.environ if environ is None else environ
    known = {*captured, *_CHOSEN_BY_SLURM}
    names = [name for name in environ if name not in known and not _OF_THE_SESSION.fullmatch(name)]
    return sorted(names, key=lambda name: (not is_secret(name, environ[name]), name))


def _is_known(name: str) -> bool:
    """Whether a variable is one that a job needs."""
    prefix, _, rest = name.partition("_")
    family = _CAPTURED_FAMILIES.get(f"{prefix}_", "").split()
    return name in _CAPTURED or name.startswith(_CAPTURED_PREFIXES) or rest.partition("_")[0] in family
