"""How a rank ends that has an error: which of them speaks, and when."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.errors import PlatformError
from megalm.resilience import reporting
from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import write_recipe

FAILS = """
import sys
from megalm import entry
from megalm.resilience import reporting

def lose(*_):
    try:
        raise RuntimeError(sys.argv[1])
    except RuntimeError as error:
        raise RuntimeError("[Stage 1] failed to run forward") from error

entry._run = lose
reporting.WAIT_FOR_REPORT_S = 0.0
entry.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("Connection closed by peer [127.0.0.1]:2", 1, "rank 0 stopped: the connection to another rank broke"),
        ("writev [127.0.0.1]:2: Broken pipe", 1, "rank 0 stopped: the connection to another rank broke"),
        ("Timed out waiting 15000ms for recv operation to complete", 6, "error on rank 0: another rank did not answer"),
        ("shapes cannot be multiplied", 1, "rank 0 failed:\nTraceback"),
    ],
)
def test_a_lost_peer_is_told_from_a_fault_of_this_rank_through_a_stage_of_the_pipeline(
    text: str, code: int, says: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS, text, "--config", write_recipe(tmp_path), "--save", tmp_path / "run"],
        env=quiet_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr[: len(says)]) == (code, says)
    assert ("Traceback" in done.stderr) == ("Traceback" in says)


@pytest.mark.parametrize(("age", "waits"), [(1.0, 8.0), (14.0, 28.0), (500.0, 60.0)])
def test_a_rank_that_leaves_the_word_to_rank_0_waits_as_long_as_that_may_still_need_to_start(
    age: float, waits: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(reporting, "seconds_since_start", lambda: age)
    monkeypatch.setattr(reporting.time, "sleep", slept.append)
    monkeypatch.setattr(reporting.signal, "signal", lambda *_: signal.SIG_DFL)
    refused = PlatformError("each would train alone")
    refused.silent = True
    reporting.report_failure(refused, 0)
    assert (slept, capsys.readouterr().err) == ([waits, reporting.SILENT_WAIT_S], "")
