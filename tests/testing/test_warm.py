"""A warm rank is like one that a launcher starts: its place, environment, output and end; nothing of it stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.testing import warm
from megalm.testing.processes import environment

TELLS = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "OF_THIS_JOB", "OF_THE_TEST")
place = {name: os.environ.get(name) for name in names}
print(json.dumps([place, sys.argv, os.getcwd(), __name__, "torch" in sys.modules]))
"""
ENDS = """
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK", "0")
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(f"asked{rank}").touch(), os._exit(7)))
pathlib.Path(f"up{rank}").touch()
while len(list(pathlib.Path().glob("up*"))) < 2:
    time.sleep(0.01)
if rank == "1": RANK_1
time.sleep(100)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_a_rank_has_the_place_environment_and_arguments_of_a_launched_one(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_TEST", "1")
    script.write_text(TELLS)
    environ = {"PATH": os.environ["PATH"], "OF_THIS_JOB": "2"}
    done = warm.run(script, "--flag", "a b", ranks=2, cwd=tmp_path, environ=environ)
    assert done.code == 0, done.output
    told = sorted((json.loads(line) for line in done.output.splitlines()), key=lambda line: line[0]["RANK"])
    for rank, (place, argv, folder, name, has_torch) in enumerate(told):
        assert place == {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2", "OF_THIS_JOB": "2",
            "MASTER_ADDR": "127.0.0.1", "OF_THE_TEST": None,
        }  # fmt: skip
        assert argv == [str(script), f"--local_rank={rank}", "--flag", "a b"]
        assert (folder, name, has_torch) == (str(tmp_path), "__main__", True)
    alone = json.loads(warm.run(script, cwd=tmp_path, environ=environ).output)
    assert (alone[0]["RANK"], alone[1]) == (None, [str(script)])


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(5)", 5),
        ("os._exit(75)", 75),
        ("raise ValueError", 1),
        ("sys.exit('wrong')", 1),
        ("os.kill(os.getpid(), 9)", 247),  # -9, as the deepspeed launcher hands it on
    ],
)
def test_the_first_rank_that_fails_gives_the_code_and_the_others_are_asked_to_end(
    end: str, code: int, script: Path, tmp_path: Path
) -> None:
    script.write_text(ENDS.replace("RANK_1", end))
    done = warm.run(script, ranks=2, cwd=tmp_path, timeout=30)
    assert done.code == code, done.output
    assert [path.name for path in tmp_path.glob("asked*")] == ["asked0"]
    assert ("Traceback" in done.output) == end.startswith("raise")


def test_nothing_is_left_when_the_time_is_over(script: Path, tmp_path: Path) -> None:
    script.write_text(ENDS.replace("RANK_1", "pass"))
    with pytest.raises(AssertionError, match="did not end within"), warm.Job(script, ranks=2, cwd=tmp_path) as job:
        job.wait(0.5)
    deadline = time.monotonic() + 10  # a process that is killed may take a moment to end
    while any(map(lives, job.pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, job.pids))


@pytest.mark.long  # after each test run of a developer who looks at the list of processes
def test_nothing_is_left_of_a_test_run_that_is_killed(script: Path, tmp_path: Path) -> None:
    script.write_text(ENDS.replace("RANK_1", "pass"))
    program = (
        "import pathlib, sys, time\nfrom megalm.testing import warm\n"
        "if __name__ == '__main__':\n"
        "    job = warm.Job(sys.argv[1], ranks=2, cwd=pathlib.Path(sys.argv[2]))\n"
        "    print(*job.pids, flush=True); time.sleep(100)\n"
    )
    (tmp_path / "test_run.py").write_text(program)
    command = [sys.executable, tmp_path / "test_run.py", script, tmp_path]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), text=True)
    assert run.stdout is not None
    pids = [int(word) for word in run.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(lives, pids))
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while any(map(lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_command_ends_with_its_code_and_says_what_is_wrong() -> None:
    assert warm.run("megalm", "--version").code == 0
    wrong = warm.run("megalm", "corpus", "--size", "1")
    assert wrong.code == 2
    assert "--size" in wrong.output


def lives(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
