"""Submitting `megalm` jobs to a test cluster and watching them."""

import re
import subprocess
import sys
import time
from pathlib import Path

from cluster import Cluster, wait_until

from megalm.storage.durable import replace_text
from megalm.testing.processes import REPOSITORY, Finished, quiet_environment
from megalm.testing.small_runs import losses_in_order

LAUNCHED = ("--exit-interval", "3")
"""How long a run is that only shows its launcher: within three steps its losses are those of others, or are not."""


def run_on(cluster: Cluster, *words: str | Path, timeout: float = 150) -> Finished:
    """Run a command whose SLURM is `cluster`."""
    done = subprocess.run(
        [str(word) for word in words], cwd=REPOSITORY, env=quiet_environment() | cluster.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout)


def submit(cluster: Cluster, *words: str | Path) -> Finished:
    """`megalm submit`."""
    return run_on(cluster, sys.executable, "-m", "megalm.cli", "submit", *words)


def hold_at(run: Path, step: int) -> None:
    """Make a run under held_gpt.py wait when it has done `step` steps."""
    run.mkdir(exist_ok=True)
    replace_text(run / "hold", str(step))


class SubmittedJob:
    """A job of the cluster and its run folder."""

    def __init__(self, cluster: Cluster, answer: Finished, run: Path) -> None:
        assert answer.code == 0, answer.output
        found = re.search(r"submitted (\d+)", answer.output)
        assert found is not None, answer.output
        self.cluster, self.number, self.run = cluster, found[1], run

    def field(self, name: str) -> str:
        """What `scontrol show job` says."""
        text = self.cluster.command("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", text)
        assert found is not None, text
        return found[1]

    @property
    def log(self) -> str:
        """What the batch script and rank 0 wrote."""
        path = self.run / "slurm" / f"job_{self.number}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        """Return as soon as the run has done `step` steps."""
        wait_until(lambda: self.steps() >= step or self.ended(), seconds, lambda: self.story("no such step"))
        assert self.steps() >= step, self.story("ended before")

    def steps(self) -> int:
        """The number of steps that the run has done."""
        return len(losses_in_order(self.run))

    def hold(self, step: int) -> None:
        """Make the run wait when it has done `step` steps (under held_gpt.py)."""
        hold_at(self.run, step)

    def go_on(self) -> None:
        """Let it run to its end."""
        (self.run / "hold").unlink()

    def wait_for_requeue(self, restarts: int, seconds: float = 90) -> None:
        """Return when the job waits for its start number `restarts`, and nothing of the last one runs."""

        def waits() -> bool:
            return self.field("JobState") == "PENDING" and int(self.field("Restarts")) == restarts

        wait_until(waits, seconds, lambda: self.story("not queued again"))
        assert self.cluster.processes() == {}, "nothing runs between two starts"

    def wait_for_end(self, seconds: float = 90) -> str:
        """The final state."""
        wait_until(self.ended, seconds, lambda: self.story("does not end"))
        return self.field("JobState")

    def wait_for_end_of_array(self, seconds: float = 90) -> None:
        """Return when no run of the array is left."""
        left = ("squeue", "--noheader", "--job", self.number)
        wait_until(lambda: not self.cluster.command(*left), seconds, lambda: self.cluster.command(*left))

    def wait_for_processes(self, seconds: float = 30) -> None:
        """Return when nothing of the job runs any more."""
        wait_until(lambda: self.cluster.processes() == {}, seconds, lambda: f"left: {self.cluster.processes()}")

    def ended(self) -> bool:
        """Whether the job is over."""
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def story(self, problem: str) -> str:
        """All that is known, for a failed test."""
        text = self.cluster.command("scontrol", "show", "job", self.number, check=False)
        said = [line for line in self.log.splitlines() if not line.startswith(" iteration")]
        return "\n".join([problem, text, *said, f"{self.steps()} steps at {time.ctime()}"])
