"""Where metrics go, one file a sink.

To add one: a file here (or a module of your own, named by --import-module) with a class that has `cadence`, `row`,
`text` and `close` (`base.Sink`), and its builder in `SINKS`; `--sinks` chooses among them by name.
"""

from collections.abc import Callable

from megalm.config.output import LoggingConfig
from megalm.monitor.sinks.base import Cadence, RunFacts, Sink
from megalm.monitor.sinks.jsonl import JsonlSink
from megalm.monitor.sinks.tensorboard import TensorBoardSink
from megalm.monitor.sinks.terminal import TerminalSink
from megalm.tables import Table

__all__ = ["SINKS", "Cadence", "RunFacts", "Sink", "build_sinks"]

SINKS: Table[Callable[[LoggingConfig, RunFacts], Sink | None]] = Table(
    "sinks", {"terminal": TerminalSink.build, "jsonl": JsonlSink.build, "tensorboard": TensorBoardSink.build}
)
"""Name -> builder; it gives None where the run has no place for this sink (no run folder)."""


def build_sinks(config: LoggingConfig, facts: RunFacts) -> list[Sink]:
    """The sinks that --sinks names, in its order.

    Raises:
        ConfigError: a name that is not in the table.
    """
    built = (SINKS[name](config, facts) for name in config.sinks)
    return [sink for sink in built if sink is not None]
