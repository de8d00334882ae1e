"""What ranks say when they are not alike, or do not come: one of them, with rank, host and both values."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from megalm import waiting
from megalm.distributed import agreement
from megalm.distributed.agreement import Agreement, Facts, tell_others
from megalm.distributed.collectives import PeerError
from megalm.distributed.environment import LaunchEnvironment
from megalm.errors import ConfigError, MegalmError, PlatformError
from megalm.testing.processes import free_port

ALONE = LaunchEnvironment.alone()
Step = Callable[[Agreement], Any]


def meeting(*steps: Step | None, timeout_s: float = 20.0) -> list[MegalmError | None]:
    """What each rank of a job gets that does its step in the exchange; None: the rank is not started."""
    store = HashStore()

    def rank(number: int, step: Step) -> MegalmError | None:
        environment = replace(ALONE, rank=number, world_size=len(steps), local_world_size=len(steps))
        try:
            step(Agreement(store, environment, timedelta(seconds=timeout_s)))
        except MegalmError as error:
            return error
        return None

    with ThreadPoolExecutor(len(steps)) as pool:
        started = [pool.submit(rank, number, step) if step else None for number, step in enumerate(steps)]
        return [future.result() if future else None for future in started]


def has(**values: Any) -> Step:
    return lambda exchange: exchange.check(Facts(values, {"lr": "--lr"}))


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ([has(lr=0.1, seed=7), has(lr=0.5, seed=7)],
         r"rank 2 on (\S+) differs from rank 0 on \1: lr is 0.5 \(--lr\) there, 0.1 \(--lr\) here"),
        ([has(lr=0.1, seed=8), has(lr=0.5, seed=7)], "rank 1 .*as do 1 more ranks.*: seed is 8 there, 7 here"),
        ([has(lr=0.1), has(lr=0.1, seed=7)], "rank 1 .*: seed is nothing there, 7 here"),
        ([has(lr=0.1, seed=7, extra="x"), has(lr=0.1, seed=7)], "rank 1 .*: extra is x there, nothing here"),
        ([has(**{f"s{n}": n for n in range(12)}), has(lr=0.1, seed=7)], "; and 6 more"),
    ],
)  # fmt: skip
def test_rank_0_says_who_differs_in_what_and_the_others_end_with_its_code(others: list[Step], text: str) -> None:
    first, *rest = meeting(has(lr=0.1, seed=7), *others)
    assert isinstance(first, ConfigError)
    assert pytest.raises(ConfigError, match=text)  # the pattern is one
    with pytest.raises(ConfigError, match=text):
        raise first
    assert all(isinstance(error, PeerError) and error.exit_code == 2 and error.silent for error in rest)


def test_ranks_that_are_alike_go_on() -> None:
    assert meeting(*[has(lr=0.1)] * 4) == [None] * 4


def test_what_one_rank_alone_finds_wrong_is_said_by_rank_0_with_its_code() -> None:
    broken = MegalmError("has no GPU")
    broken.exit_code = 6
    first, second, third = meeting(has(lr=1), lambda exchange: exchange.tell(broken), has(lr=1))
    assert str(first).startswith("rank 1 on ")
    assert str(first).endswith("not rank 0: has no GPU")
    assert first is not None
    assert first.exit_code == 6
    assert second is None  # told: rank 0 speaks for it
    assert isinstance(third, PeerError)
    assert third.exit_code == 6


def test_rank_0s_own_error_ends_the_others() -> None:
    first, second = meeting(lambda exchange: exchange.tell(ConfigError("no")), has(lr=1))
    assert first is None
    assert isinstance(second, PeerError)
    assert second.exit_code == 2


def test_a_rank_that_does_not_come_is_named_while_it_is_waited_for_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "SPEAK_AFTER_S", 0.3)
    first, second, _ = meeting(has(lr=1), has(lr=1), None, timeout_s=1.0)
    assert isinstance(first, PlatformError)
    assert "rank 2 of 3 did not come to 127.0.0.1" in str(first)
    assert isinstance(second, PeerError)
    assert second.exit_code == PlatformError.exit_code
    said = capsys.readouterr().err
    assert "waiting for 0 s: rank 2 of 3 did not come" in said
    assert "there: rank 0 on" in said


def test_a_failed_rank_finds_the_others_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_TELL_S", 10.0)
    port = free_port()
    first, second = (
        replace(ALONE, rank=rank, world_size=2, local_world_size=1, master_port=port, launcher="srun")
        for rank in (0, 1)
    )
    errors: list[MegalmError] = []

    def meet() -> None:
        try:
            agreement.meet(first, Facts({"lr": 1}), 1.0)
        except MegalmError as error:
            errors.append(error)

    rank_0 = threading.Thread(target=meet)
    rank_0.start()
    own = ConfigError("3 must divide 4")
    tell_others(own, second)
    rank_0.join()
    assert own.silent
    assert "rank 1" in str(errors[0])
    assert "3 must divide 4" in str(errors[0])
