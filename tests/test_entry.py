"""How a rank ends that has an error: which of them speaks, and when."""

from pathlib import Path

import pytest

from megalm.errors import PlatformError
from megalm.resilience import reporting
from megalm.resilience.signals import StopRequest


def stage_that_meets(text: str) -> None:
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        raise RuntimeError("[Stage 1] failed to run forward") from error


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("Connection closed by peer [127.0.0.1]:2", 1, "rank 0 stopped: the connection to another rank broke"),
        ("writev [127.0.0.1]:2: Broken pipe", 1, "rank 0 stopped: the connection to another rank broke"),
        ("Timed out waiting 15000ms for recv operation to complete", 6, "error on rank 0: another rank did not answer"),
        ("shapes cannot be multiplied", 1, "rank 0 failed:\n"),
    ],
)
def test_a_lost_peer_is_told_from_a_fault_of_this_rank_through_a_stage_of_the_pipeline(
    text: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting, "WAIT_FOR_REPORT_S", 0.0)
    with pytest.raises(RuntimeError) as failed:
        stage_that_meets(text)
    assert reporting.report_failure(failed.value, 0, StopRequest()) == code
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert ("Traceback" in said) == ("failed" in says)


def test_only_frames_of_the_package_itself_are_shown_wherever_it_is_checked_out() -> None:
    package = Path(reporting.__file__).parents[1]
    assert reporting.is_own(reporting.__file__)
    assert reporting.is_own(str(package / "training.py"))
    for other in (
        package.parent / ".venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py",
        Path("/home/me/megalm/.venv/lib/python3.11/site-packages/deepspeed/runtime/engine.py"),
        package.with_name("megalm2") / "x.py",
    ):
        assert not reporting.is_own(str(other))


@pytest.mark.parametrize(("age", "waits"), [(1.0, 8.0), (14.0, 28.0), (500.0, 60.0)])
def test_a_rank_that_leaves_the_word_to_rank_0_waits_as_long_as_that_may_still_need_to_start(
    age: float, waits: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(reporting, "seconds_since_start", lambda: age)
    monkeypatch.setattr(reporting.time, "sleep", slept.append)
    refused = PlatformError("each would train alone")
    refused.silent = True
    reporting.report_failure(refused, 0, StopRequest())
    assert (slept, capsys.readouterr().err) == ([waits, reporting.SILENT_WAIT_S], "")
