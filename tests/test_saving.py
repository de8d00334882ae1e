"""What training does about a save that fails: warn and go on, or end, alike on every rank."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megalm import training
from megalm.distributed.collectives import PeerError
from megalm.errors import CheckpointError, MegalmError, NonFiniteError


def stub_run() -> Any:
    """As much of a run as saving looks at."""
    return SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(save="run")),
        saved_step=-1,
        progress=SimpleNamespace(step=20),
        metric_logger=SimpleNamespace(pause=lambda: None, resume=lambda: None),
        context=SimpleNamespace(mesh="world 2", device=None),
        engine=None,
        identity={},
        states=[],
    )


def failing_with(error: MegalmError | None) -> Any:
    def save(*_: Any) -> str:
        if error is not None:
            raise error
        return "run/step_20"

    return save


def peer(code: int) -> PeerError:
    error = PeerError("rank 1: cannot write run/x: No space left on device")
    error.exit_code = code
    return error


@pytest.mark.parametrize("error", [CheckpointError("cannot write run/x: No space left on device"), peer(4)])
def test_the_disks_refusal_is_a_warning_and_the_next_save_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: MegalmError
) -> None:
    run = stub_run()
    monkeypatch.setattr(training, "save", failing_with(error))
    with caplog.at_level(logging.WARNING, "megalm"):
        training.save_now(run, may_fail=True)
    assert [record.getMessage().startswith("step 20 is not saved: ") for record in caplog.records] == [True]
    assert "No space left on device" in caplog.text
    assert run.saved_step == -1
    with pytest.raises(MegalmError, match="No space left"):
        training.save_now(run)
    monkeypatch.setattr(training, "save", failing_with(None))
    training.save_now(run, may_fail=True)
    assert run.saved_step == 20


@pytest.mark.parametrize("error", [NonFiniteError("the weights are not finite"), peer(NonFiniteError.exit_code)])
def test_what_is_not_the_disks_fault_ends_the_run_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, error: MegalmError
) -> None:
    monkeypatch.setattr(training, "save", failing_with(error))
    with pytest.raises(type(error)):
        training.save_now(stub_run(), may_fail=True)
