"""A real SLURM on this machine: munge, slurmctld and a slurmd for each of five nodes, from the distribution's packages.

Everything lies in one temporary folder and listens on ports of its own, so that several clusters (and an installed
one) live beside each other. Every daemon is a child that dies with this process (`setpriv --pdeathsig`), and a guard
(this file as a program) outlives it by the time that it takes to kill what the daemons started: a test run that is
interrupted or killed leaves nothing.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
NODES = ("n1", "n2", "n3", "n4", "n5")
"""Four nodes, and one to take the place of a node that dies."""
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
InactiveLimit=0
KillWait=20
MinJobAge=300
SlurmdTimeout=6
SlurmctldTimeout=30
MessageTimeout=6
UnkillableStepTimeout=60
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n[1-5] Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=n[1-5] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)"
    return None if os.geteuid() == 0 else "a SLURM on one machine needs root"


class Cluster:
    """The daemons of one cluster; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.guard: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        command = [sys.executable, "-S", __file__, str(self.folder)]
        self.guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        host, ports = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIG.format(host=host, ports=ports, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self.daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files['socket']}",
            f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}",
        )  # fmt: skip
        wait_until(files["socket"].exists, 10, "munged has no socket")
        self.daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.states() == ["idle"] * len(NODES), 30, self.logs)

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node."""
        (self.folder / f"spool_{name}").mkdir(exist_ok=True)
        self.daemon(f"slurmd {name}", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power cut does to a node: its slurmd and everything that runs under it are gone at once."""
        daemon = self.daemons.pop(f"slurmd {name}")
        tasks = self.processes(name)
        parents = {parent_of(task) for task in tasks} - {0, 1, daemon.pid}
        # a task last: its slurmstepd, still alive, would report its end, which no power cut does
        for pid in (daemon.pid, *parents, *(task for task in tasks if task not in parents)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def daemon(self, name: str, *arguments: str) -> None:
        """Start a daemon that ends with this process."""
        output = open(self.folder / f"{name.replace(' ', '_')}.out", "ab")  # noqa: SIM115
        with output:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", name.split()[0], *arguments],
                env=os.environ | self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def logs(self) -> str:
        """The ends of what the daemons wrote."""
        files = [path for path in self.folder.iterdir() if path.suffix in (".log", ".out")]
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in files)

    def command(self, *words: str, check: bool = True) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """The state of each node."""
        return self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def stop(self) -> None:
        """End the jobs, then what this object started."""
        if "slurmctld" in self.daemons:
            self.command("scancel", "--user", "root", check=False)
            deadline = time.monotonic() + 15
            while self.command("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        if self.guard is not None and self.guard.stdin is not None:
            self.guard.stdin.close()
            self.guard.wait()

    def processes(self, node: str | None = None) -> dict[int, str]:
        """The command lines of the jobs' processes (on one node), by process id."""
        found = {}
        for pid, variables in processes_of(self.folder).items():
            at = [value.removeprefix("SLURMD_NODENAME=") for value in variables if value.startswith("SLURMD_NODENAME=")]
            if at and node in (None, at[0]):
                with contextlib.suppress(OSError):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        return found


def processes_of(folder: Path) -> dict[int, list[str]]:
    """The environment of every process that a cluster's daemons and commands started, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                variables = (entry / "environ").read_text(errors="replace").split("\0")
                if f"SLURM_CONF={folder}/slurm.conf" in variables:
                    found[int(entry.name)] = variables
    return found


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the range from which the kernel gives ports to clients."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(22000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


def wait_until(holds: Callable[[], bool], seconds: float, problem: Callable[[], str] | str) -> None:
    """Return as soon as `holds()`.

    Raises:
        AssertionError: it does not within `seconds`; the text is `problem`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(problem if isinstance(problem, str) else problem())
        time.sleep(0.1)


def main() -> None:
    """Wait for the end of the process at the other end of standard input; then kill what is left of its cluster."""
    sys.stdin.read()
    while left := processes_of(Path(sys.argv[1])):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
