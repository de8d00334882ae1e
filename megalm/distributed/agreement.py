"""All ranks agree, before anything is built that their settings give a shape: one exchange through the store.

Phases: every rank leaves a frame with its facts (JSON); rank 0 compares them with its own and leaves a verdict; all
read it. A rank that cannot come so far leaves its error in place of facts.
"""

import contextlib
import json
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from megalm.distributed.collectives import PeerError
from megalm.distributed.environment import LaunchEnvironment
from megalm.distributed.rendezvous import open_store
from megalm.errors import ConfigError, MegalmError, PlatformError
from megalm.waiting import SPEAK_AFTER_S, Patience

_MOST_SHOWN = 8
_LOOK_S, _LONGEST_LOOK_S = 0.01, 0.25
_TELL_S = 15.0
"""How long a rank that has failed looks for somebody to tell."""


@dataclass(frozen=True)
class Facts:
    """What must be the same on all ranks, by name, and where a rank has a value from, if that is known."""

    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)

    def shown(self, name: str) -> str:
        """A value as a message shows it."""
        value = self.values.get(name)
        text = "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
        source = self.sources.get(name)
        return f"{text if len(text) <= 80 else text[:77] + '...'}{f' ({source})' if source else ''}"


@dataclass(frozen=True)
class _Frame:
    """What a rank says of itself."""

    host: str
    facts: Facts = field(default_factory=lambda: Facts({}))
    error: str = ""
    exit_code: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "_Frame":
        values = json.loads(text)
        return cls(values["host"], Facts(**values["facts"]), values["error"], values["exit_code"])


def meet(environment: LaunchEnvironment, facts: Facts, timeout_minutes: float) -> Store | None:
    """Find the other ranks and agree with them; the store in which they meet, None for a single process.

    Raises:
        PlatformError: they do not meet in time. ConfigError, PeerError: as `Agreement.check`.
    """
    if environment.world_size == 1:
        return None
    timeout = timedelta(minutes=timeout_minutes)
    store = open_store(environment, timeout)
    try:
        Agreement(store, environment, timeout).check(facts)
    except RuntimeError as error:  # what torch raises where the store is gone
        gone = PlatformError(
            f"rank {environment.rank} lost rank 0, which keeps the store at {environment.master_addr}:"
            f"{environment.master_port}: {str(error).splitlines()[0]}; that rank, or the launcher, says why"
        )
        gone.local, gone.silent = environment.rank == 1, environment.rank > 1
        raise gone from error
    return store


class Agreement:
    """The exchange of one job, on this rank."""

    def __init__(self, store: Store, environment: LaunchEnvironment, timeout: timedelta) -> None:
        self._store, self._environment = store, environment
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._minutes = timeout.total_seconds() / 60

    def check(self, facts: Facts) -> None:
        """Returns where the facts of all ranks are the same.

        Raises:
            ConfigError (on rank 0): they are not; the text names a rank, its host, what differs and both values.
            MegalmError (on rank 0): the error that another rank has left; or a rank does not come in time.
                PeerError (on other ranks): rank 0 has raised one of these.
        """
        self._leave(_Frame(socket.gethostname(), facts))
        if self._environment.is_first:
            self._judge(facts)
        else:
            self._await_verdict()

    def tell(self, error: MegalmError) -> bool:
        """Leave an error in place of facts; whether rank 0 speaks for this rank from now on."""
        self._leave(_Frame(socket.gethostname(), error=str(error), exit_code=error.exit_code))
        if self._environment.is_first:
            self._give(error.exit_code)
            return False
        with contextlib.suppress(PeerError):
            self._await_verdict()
            return False
        return True

    def _leave(self, frame: _Frame) -> None:
        self._store.set(self._key(self._environment.rank), frame.to_json())

    def _key(self, what: object) -> str:
        return f"megalm/agreement/{self._environment.restart}/{what}"

    def _judge(self, facts: Facts) -> None:
        """Rank 0: compare, and let the others know."""
        error = self._missing() or _difference(self._frames(), facts)
        self._give(error.exit_code if error else 0)
        if error:
            raise error

    def _give(self, exit_code: int) -> None:
        """The verdict; a bad one is given time to be read, since rank 0 may keep the store."""
        self._store.set(self._key("verdict"), str(exit_code))
        awaited, until = list(range(1, self._environment.world_size)), time.monotonic() + _TELL_S
        while exit_code and awaited and time.monotonic() < until:
            time.sleep(_LOOK_S)
            if time.monotonic() > self._deadline:  # not for those that did not come either
                awaited = [rank for rank in awaited if self._store.check([self._key(rank)])]
            awaited = [rank for rank in awaited if not self._store.check([self._key(f"read/{rank}")])]

    def _missing(self) -> PlatformError | None:
        """Wait for all ranks; the error where some do not come."""
        environment, patience, look_s = self._environment, Patience(), _LOOK_S
        away = [rank for rank in range(environment.world_size) if not self._store.check([self._key(rank)])]
        while away:
            if time.monotonic() > self._deadline:
                return PlatformError(f"{self._who(away)} within {self._minutes:g} minutes; {_REASONS}")
            if patience.is_over():
                self._store.set(self._key("spoken"), "")
                patience.say(f"{self._who(away)}; {_REASONS}")
            time.sleep(look_s)
            look_s = min(2 * look_s, _LONGEST_LOOK_S)
            away = [rank for rank in away if not self._store.check([self._key(rank)])]
        return None

    def _who(self, away: Sequence[int]) -> str:
        environment = self._environment
        there = [rank for rank in range(environment.world_size) if rank not in away]
        frames = [_Frame.from_json(self._store.get(self._key(rank))) for rank in there[:_MOST_SHOWN]]
        hosts = ", ".join(f"rank {rank} on {frame.host}" for rank, frame in zip(there, frames, strict=False))
        return (
            f"{_ranks(away)} of {environment.world_size} did not come to {environment.master_addr}:"
            f"{environment.master_port} (there: {hosts}{', ...' if len(there) > _MOST_SHOWN else ''})"
        )

    def _frames(self) -> list[_Frame]:
        keys = [self._key(rank) for rank in range(self._environment.world_size)]
        return [_Frame.from_json(text) for text in self._store.multi_get(keys)]

    def _await_verdict(self) -> None:
        """Another rank: what rank 0 says."""
        key, patience, look_s = self._key("verdict"), Patience(SPEAK_AFTER_S + 5), _LOOK_S
        while not self._store.check([key]):
            if time.monotonic() > self._deadline + _TELL_S:
                late = PlatformError(f"rank 0 did not come within {self._minutes:g} minutes; {_REASONS}")
                late.local, late.silent = self._environment.rank == 1, self._environment.rank > 1
                raise late
            # rank 0 itself says who is missing, unless it is the one
            if patience.is_over() and self._environment.rank == 1 and not self._store.check([self._key("spoken")]):
                patience.say(f"rank 0 did not come yet; {_REASONS}")
            time.sleep(look_s)
            look_s = min(2 * look_s, _LONGEST_LOOK_S)
        code = int(self._store.get(key))
        self._store.set(self._key(f"read/{self._environment.rank}"), "")
        if code:
            error = PeerError("rank 0 says why")
            error.exit_code = code
            raise error


_REASONS = "they were not started, are slower, or cannot reach that address (MASTER_ADDR, firewall, other network)"


def tell_others(error: MegalmError, environment: LaunchEnvironment) -> None:
    """Let the other ranks know of an error that this one has before it met them; they would wait for it.

    Rank 0 does so only where no launcher of its own node ends the others. Where rank 0 takes the error of another rank,
    that one is silent.
    """
    one_node = environment.world_size == environment.local_world_size
    if environment.world_size == 1 or (environment.is_first and one_node):
        return
    wait = timedelta(seconds=_TELL_S)
    with contextlib.suppress(MegalmError, RuntimeError, OSError):
        told = Agreement(open_store(environment, wait), environment, wait).tell(error)
        error.silent = error.silent or told


def _difference(frames: Sequence[_Frame], facts: Facts) -> MegalmError | None:
    """What the first rank that differs from rank 0 has otherwise; None where all are the same."""
    failed = next((rank for rank, frame in enumerate(frames) if frame.error), None)
    if failed is not None:
        error = MegalmError(f"rank {failed} on {frames[failed].host}, not rank 0: {frames[failed].error}")
        error.exit_code = frames[failed].exit_code
        return error
    by_names: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, frame in enumerate(frames):
        names = tuple(
            name for name in {**facts.values, **frame.facts.values}
            if facts.values.get(name) != frame.facts.values.get(name)
        )  # fmt: skip
        if names:
            by_names[names].append(rank)
    if not by_names:
        return None
    names, ranks = next(iter(by_names.items()))
    theirs = frames[ranks[0]].facts
    lines = [f"{name} is {theirs.shown(name)} there, {facts.shown(name)} here" for name in names[:_MOST_SHOWN]]
    more = f"; and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    others = sum(len(found) for found in by_names.values()) - 1
    also = f" (as do {others} more ranks)" if others else ""
    return ConfigError(
        f"rank {ranks[0]} on {frames[ranks[0]].host} differs from rank 0 on {frames[0].host}{also}: "
        f"{'; '.join(lines)}{more}; all ranks must run the same command line, files and software"
    )


def _ranks(numbers: Sequence[int]) -> str:
    """`ranks 1, 2, 5` or `rank 3`."""
    shown = ", ".join(map(str, numbers[:_MOST_SHOWN])) + (", ..." if len(numbers) > _MOST_SHOWN else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
