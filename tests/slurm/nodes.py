"""Two machines in one: network namespaces with addresses and a host name of their own, each with an ssh daemon.

What a launcher that goes from node to node by ssh finds in a cluster without a scheduler: the file system is shared,
the loopback is not. The daemons die with this process; the namespaces are named after it and removed by `stop`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import wait_until

PROGRAMS = ("ip", "pdsh", "setpriv", "ssh", "ssh-keygen", "unshare", "/usr/sbin/sshd")
DYING = ("setpriv", "--pdeathsig", "KILL")
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """#!/bin/sh
exec {ssh} -F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


def missing_for_nodes() -> str | None:
    """Why no nodes can be made here, or None."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)} (Debian: iproute2 openssh-server pdsh)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "network namespaces need root and CAP_SYS_ADMIN"
    return None


class Nodes:
    """The nodes; use as a context manager."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        net = 1 + os.getpid() % 250  # two test processes at once do not share a network
        self.bridge = f"megalm{os.getpid()}"
        self.gateway = f"10.213.{net}.254"
        self.addresses = [f"10.213.{net}.{number}" for number in range(1, count + 1)]
        self.daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which `ssh` reaches the nodes."""
        return {"PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __enter__(self) -> "Nodes":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's empty folder
        for name in ("key", "host_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        program = self.folder / "bin/ssh"
        program.write_text(SSH.format(ssh=shutil.which("ssh"), folder=self.folder))
        program.chmod(0o755)
        _call("ip", "link", "add", self.bridge, "type", "bridge")
        _call("ip", "address", "add", f"{self.gateway}/24", "dev", self.bridge)
        _call("ip", "link", "set", self.bridge, "up")
        for number, address in enumerate(self.addresses, 1):
            self._add(number, address)
        wait_until(
            lambda: all(_answers(self.environment, address) for address in self.addresses), 20, "no sshd answers"
        )

    def _add(self, number: int, address: str) -> None:
        """A namespace on the bridge, and its ssh daemon."""
        name = f"{self.bridge}-{number}"
        _call("ip", "netns", "add", name)
        _call("ip", "link", "add", f"v{os.getpid()}-{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _call("ip", "link", "set", f"v{os.getpid()}-{number}", "master", self.bridge, "up")
        _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _call("ip", "-n", name, "link", "set", device, "up")
        config = self.folder / f"sshd_{number}"
        config.write_text(SSHD.format(address=address, folder=self.folder))
        program = f"hostname node{number} && exec /usr/sbin/sshd -D -e -f {config}"
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", program]
        with (self.folder / f"sshd_{number}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen([*DYING, *inside], stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    @property
    def inside(self) -> list[list[str]]:
        """For each node, the words before a command that is to run there."""
        names = [f"{self.bridge}-{number}" for number in range(1, len(self.addresses) + 1)]
        return [["ip", "netns", "exec", name] for name in names]

    def cut(self, number: int) -> None:
        """Take a node (1, 2, ...) off the network, silently: what is sent is lost."""
        _call("ip", "link", "set", f"v{os.getpid()}-{number}", "down")

    def join(self, number: int) -> None:
        """Put it back."""
        _call("ip", "link", "set", f"v{os.getpid()}-{number}", "up")

    def processes(self) -> list[int]:
        """What runs on the nodes, other than their ssh daemons."""
        names = [f"{self.bridge}-{number}" for number in range(1, len(self.addresses) + 1)]
        found = [
            int(pid)
            for name in names
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        ]
        return [pid for pid in found if pid not in {daemon.pid for daemon in self.daemons}]

    def stop(self) -> None:
        """End what runs on the nodes, then the nodes."""
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for number in range(1, len(self.addresses) + 1):
            subprocess.run(["ip", "netns", "delete", f"{self.bridge}-{number}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


def _answers(environment: dict[str, str], address: str) -> bool:
    command: Sequence[str] = ["ssh", "-o", "ConnectTimeout=5", address, "true"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True).returncode == 0


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def main() -> None:
    """Start the nodes and a shell that reaches them, to try things by hand."""
    with Nodes(Path(sys.argv[1])) as nodes:
        print(*nodes.addresses)
        subprocess.run(["bash"], env=os.environ | nodes.environment)


if __name__ == "__main__":
    main()
