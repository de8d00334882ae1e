"""What SLURM tells a task of `srun`: its rank, and from the job alone where all its tasks meet. Pure but for a query.

Tasks, not hosts, are counted: several slurmd on one machine share its host name.
"""

import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalm.errors import PlatformError

_SHELLS = ("sh", "bash", "zsh", "dash", "ksh", "csh", "tcsh", "fish")
_FIRST_PORT, _NUM_PORTS, _NUM_CANDIDATES = 12000, 20000, 8  # below the range from which kernels serve clients (32768)


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process; the batch script itself has no step."""
    return "SLURM_STEP_NUM_TASKS" in environ


def in_interactive_shell(environ: Mapping[str, str]) -> bool:
    """Whether this process was started in a shell at which a user types (`srun --pty bash`, `salloc` of some sites).

    Its variables describe the step, but its other tasks run nothing: the process is no rank of it.
    """
    import psutil

    task = environ.get("SLURM_TASK_PID", "")
    if not in_step(environ) or not any(name.startswith("SLURM_PTY_") for name in environ) or not task.isdigit():
        return False
    try:
        return _waits_for_commands(psutil.Process(int(task)).cmdline())
    except psutil.Error:
        return False


def _waits_for_commands(words: Sequence[str]) -> bool:
    """Whether a command line starts a shell without a script."""
    shell = Path(words[0]).name.lstrip("-") if words else ""
    return shell in _SHELLS and all(word.startswith("-") and "c" not in word.lstrip("-")[:1] for word in words[1:])


def num_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of this step of `srun`."""
    return number(environ, "SLURM_STEP_NUM_TASKS")


def launch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A task of `srun` as the other launchers would describe it.

    Raises:
        PlatformError: a variable is missing, not a number, or contradicts another.
    """
    if environ.get("SLURM_HET_SIZE", "1") not in ("", "1"):
        raise PlatformError(
            f"SLURM_HET_SIZE={environ['SLURM_HET_SIZE']}: the components of a heterogeneous job do not know each "
            "other's ranks; ask for all nodes in one component, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT for each task"
        )
    counts = tasks_per_node(_get(environ, "SLURM_STEP_TASKS_PER_NODE"))
    node, tasks = number(environ, "SLURM_NODEID"), num_tasks(environ)
    if node >= len(counts) or sum(counts) != tasks:
        raise PlatformError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} does not describe node {node} "
            f"(SLURM_NODEID) of a step of {tasks} tasks (SLURM_STEP_NUM_TASKS); these variables are of another step: "
            "start with srun, from a shell that has not exported them"
        )
    return {
        "RANK": _get(environ, "SLURM_PROCID"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": _get(environ, "SLURM_LOCALID"),
        "LOCAL_SIZE": str(counts[node]),
    }


def tasks_per_node(text: str) -> list[int]:
    """[4, 4, 3] from SLURM's "4(x2),3".

    Raises:
        PlatformError: the text is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise PlatformError(f"SLURM_STEP_TASKS_PER_NODE={text!r} must be counts such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def meeting_address(environ: Mapping[str, str]) -> str:
    """Where rank 0 is: the loopback if all tasks are on one node, else the first node of the step.

    Raises:
        PlatformError: that is not known.
    """
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        return node_address(_first_of_arbitrary(environ))
    return node_address(first_node(_get(environ, "SLURM_STEP_NODELIST")))


def _first_of_arbitrary(environ: Mapping[str, str]) -> str:
    """The node of task 0 under --distribution=arbitrary, where a list of the user's decides; SLURM sorts its own."""
    if environ.get("SLURM_ARBITRARY_NODELIST"):
        return first_node(environ["SLURM_ARBITRARY_NODELIST"])
    try:
        lines = Path(environ.get("SLURM_HOSTFILE", "")).read_text(encoding="utf-8").split()
        return lines[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise PlatformError(
            "under --distribution=arbitrary the node of rank 0 is the first of SLURM_HOSTFILE, which "
            f"{environ.get('SLURM_HOSTFILE') or 'is not set and so'} does not tell it here; export MASTER_ADDR in the "
            "batch script"
        ) from None


def meeting_ports(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Ports that follow from job and step, to be tried in this order: other jobs on the node have others."""
    job, step = number(environ, "SLURM_JOB_ID"), environ.get("SLURM_STEP_ID", "0")
    start = job * 131 + (int(step) if step.isdigit() else 0) * _NUM_CANDIDATES
    return tuple(_FIRST_PORT + (start + other * 1009) % _NUM_PORTS for other in range(_NUM_CANDIDATES))


def job_name(environ: Mapping[str, str]) -> str:
    """What tells this step, and this start of a requeued job, from every other."""
    return ".".join(environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def first_node(nodes: str) -> str:
    """`rack1n03` from `rack[1-2]n[03-07,9],login`."""
    text = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", text)


def node_address(node: str) -> str:
    """An address of a node: its name if that resolves, else what SLURM's configuration says.

    Raises:
        PlatformError: neither is known.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        command = ["scontrol", "--oneliner", "show", "node", node]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    found = re.search(r"\bNodeAddr=(\S+)", answer)
    if found is None:
        raise PlatformError(
            f"the ranks meet on the first node, {node}, but that name has no address here (no name server knows it and "
            "scontrol gives none); export MASTER_ADDR in the batch script"
        )
    return found[1]


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable that is a count or an index.

    Raises:
        PlatformError: it is missing or not a whole number.
    """
    text = _get(environ, name)
    if not text.isdigit():
        raise PlatformError(f"{name}={text!r} in the environment must be a whole number")
    return int(text)


def _get(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise PlatformError(
            f"the environment has SLURM_STEP_NUM_TASKS but not {name}: it is not that of a task of srun; start with "
            "srun"
        )
    return environ[name]
