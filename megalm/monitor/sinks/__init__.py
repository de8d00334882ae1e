"""Where metrics go, one file a sink.

To add one: a file here (or a module of your own, named by --import-module) with a class that has `cadence`, `row`,
`text` and `close` (`base.Sink`), and its builder in `SINKS`; `--sinks` chooses among them by name.
"""

import logging
from collections.abc import Callable

from megalm.config.output import LoggingConfig
from megalm.monitor.sinks.base import Cadence, RunFacts, Sink
from megalm.monitor.sinks.failures import failure_of
from megalm.monitor.sinks.jsonl import JsonlSink
from megalm.monitor.sinks.tensorboard import TensorBoardSink
from megalm.monitor.sinks.terminal import TerminalSink
from megalm.tables import Table

log = logging.getLogger("megalm")

__all__ = ["SINKS", "Cadence", "RunFacts", "Sink", "build_sinks"]

SINKS: Table[Callable[[LoggingConfig, RunFacts], Sink | None]] = Table(
    "sinks", {"terminal": TerminalSink.build, "jsonl": JsonlSink.build, "tensorboard": TensorBoardSink.build}
)
"""Name -> builder; it gives None where the run has no place for this sink (no run folder)."""


def build_sinks(config: LoggingConfig, facts: RunFacts) -> list[Sink]:
    """The sinks that --sinks names, in its order; one whose files cannot be had is left out, with a warning.

    Raises:
        ConfigError: a name that is not in the table.
    """
    built = []
    for name in config.sinks:
        build = SINKS[name]
        try:
            built.append(build(config, facts))
        except OSError as error:
            log.warning("%s; training goes on without it", failure_of(f"--sinks {name}", error))
    return [sink for sink in built if sink is not None]
