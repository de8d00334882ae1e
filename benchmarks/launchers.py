"""Seconds from the command to the first training step on four ranks: deepspeed, srun and mpirun against bare torchrun.

    python benchmarks/launchers.py [rounds]

srun runs on a four-node SLURM that is started for it (tests/slurm/cluster.py; needs root, slurm-wlm and munge).
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import LAYOUT, write_recipe

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests/slurm"))

from cluster import Cluster, missing  # noqa: E402


def first_step_s(command: list[str], environ: dict[str, str]) -> float:
    """Seconds until the log line of the first step."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    lines = iter(process.stdout)
    found = any(line.startswith(" iteration") for line in lines)
    taken = time.monotonic() - begin
    for _ in lines:
        pass
    if not found or process.wait():
        raise SystemExit(f"{' '.join(command)} failed; run it by hand")
    return taken


def main() -> None:
    """Print the median of each launcher and its difference to torchrun's."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    if reason := missing():
        raise SystemExit(f"no SLURM can be started: {reason}")
    folder = Path(tempfile.mkdtemp())
    try:
        with Cluster(folder / "cluster") as cluster:
            recipe = ["--config", str(write_recipe(folder)), *LAYOUT, "--save", str(folder / "run"), "--fresh"]
            recipe += ["--train-iters", "6"]
            training = ["launch/pretrain_gpt.py", *recipe]
            python = [sys.executable, "-u", *training]
            plain = quiet_environment()
            commands = {
                "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "4", *training], plain),
                "deepspeed": (["deepspeed", "--num_accelerators", "4", *training], plain | {"DS_ACCELERATOR": "cpu"}),
                "srun": (["srun", "--nodes=4", "--ntasks=4", "--unbuffered", *python], plain | cluster.environment),
                "mpirun": (["bash", "launch/mpi/pretrain_gpt.sh", "4", *recipe], plain),
            }
            taken: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name, (command, environ) in commands.items():
                    taken[name].append(first_step_s(command, environ))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    base = statistics.median(taken["torchrun"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:9} {median:5.1f} s to the first step, {median - base:+5.1f} s to torchrun ({rounds} rounds)")


if __name__ == "__main__":
    main()
