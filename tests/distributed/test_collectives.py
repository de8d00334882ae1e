"""Agreements between ranks, on real ranks: nobody hangs, nobody goes on alone."""

import contextlib
import errno
import io
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm import waiting
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.errors import CheckpointError, DataError, MegalmError, PlatformError
from megalm.testing.spawner import run_on_ranks

CPU = torch.device("cpu")
VALUES: list[Any] = [
    0,
    {"text": "Größe 𝄞 \u2028 \ud800", "nothing": None},
    ["x" * 70_000, [1.5, -0.0, 2**70], True],
]


def gathered(values: list[Any]) -> list[Any]:
    return gather_json(values[dist.get_rank()], CPU)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gather_json_gives_every_rank_every_value_whatever_its_length(ranks: int) -> None:
    assert run_on_ranks(ranks, gathered, VALUES, timeout_s=30) == [VALUES[:ranks]] * ranks


def outcome(failing: dict[int, Exception]) -> dict[str, Any]:
    """What `together` does where `failing` names the ranks whose action fails."""
    rank = dist.get_rank()

    def action() -> str:
        if rank in failing:
            raise failing[rank]
        return f"done by {rank}"

    seen: dict[str, Any] = {}
    try:
        seen["result"] = on_all_ranks(CPU, action)
    except MegalmError as error:
        seen |= {"type": type(error).__name__, "text": str(error), "code": error.exit_code}
        seen |= {"local": error.local, "silent": error.silent}
    # the ranks still talk in step after a failure
    seen["after"] = gather_json(rank, CPU)
    return seen


def test_together_gives_each_rank_its_own_result_when_all_succeed() -> None:
    seen = run_on_ranks(3, outcome, {}, timeout_s=30)
    assert [row["result"] for row in seen] == ["done by 0", "done by 1", "done by 2"]


def test_the_failing_rank_raises_its_error_and_the_others_leave_with_its_exit_code() -> None:
    seen = run_on_ranks(3, outcome, {1: DataError("no such corpus")}, timeout_s=30)
    own = {"type": "DataError", "text": "no such corpus", "code": DataError.exit_code, "local": True, "silent": False}
    peer = {"type": "PeerError", "code": DataError.exit_code, "local": False, "silent": True}
    assert seen[1].items() >= own.items()
    for row in (seen[0], seen[2]):
        assert row.items() >= peer.items()
        assert "rank 1" in row["text"]
    assert all(row["after"] == [0, 1, 2] for row in seen)


def test_of_several_failing_ranks_only_the_first_speaks() -> None:
    seen = run_on_ranks(3, outcome, {1: CheckpointError("here"), 2: DataError("there")}, timeout_s=30)
    assert [row["silent"] for row in seen] == [True, False, True]
    assert {row["code"] for row in seen} == {CheckpointError.exit_code}


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a"),
            "cannot use /a: No space left on device",
            PlatformError,
        ),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "the system refused: Input/output error", PlatformError),
        (TimeoutError("the disk sleeps"), "the disk sleeps", MegalmError),
    ],
)
def test_an_operating_system_error_becomes_a_megalm_error_for_all(
    error: OSError, text: str, kind: type[MegalmError]
) -> None:
    seen = run_on_ranks(2, outcome, {1: error}, timeout_s=30)
    assert (seen[1]["type"], seen[1]["text"][: len(text)], seen[1]["local"]) == (kind.__name__, text, True)
    assert (seen[0]["type"], seen[0]["code"]) == ("PeerError", kind.exit_code)
    assert seen[0]["text"].startswith(f"rank 1: {text}")


def said_by_this_rank(late: int) -> str:
    """What this rank prints while rank `late` is busy for longer than ranks wait in silence."""
    waiting.SPEAK_AFTER_S = 0.3
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        on_all_ranks(CPU, lambda: time.sleep(1.5 if dist.get_rank() == late else 0), "building the indices")
    return text.getvalue()


def test_who_waits_says_for_whom_and_one_rank_only() -> None:
    first, second, third = run_on_ranks(3, said_by_this_rank, 0, timeout_s=30)
    assert "rank 0 on " in second
    assert "(building the indices) did not come to: building the indices" in second
    assert (first, third) == ("", "")
