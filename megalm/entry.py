"""From a launch script's command line to the loop: configuration first, then the ranks, then torch and DeepSpeed.

Wrong input ends here in one message from one rank. Nothing heavy is imported before the configuration is checked.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from megalm.checkpoint.fresh import command_of, without_done_commands
from megalm.config import load
from megalm.config.sections import RunConfig
from megalm.distributed.environment import LaunchEnvironment, prepare_process, read_environment
from megalm.errors import ConfigError, MegalmError
from megalm.processes import outlive_readers
from megalm.resilience.launcher import grace_note, watch_launcher
from megalm.resilience.reporting import leave, report_failure
from megalm.resilience.signals import StopRequest
from megalm.tables import import_modules

if TYPE_CHECKING:
    import torch

    from megalm.distributed.agreement import Facts


def main(
    argv: Sequence[str] | None = None, prog: str | None = None, defaults: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Run a training command line and exit: 0 when done, else the error's exit code (see docs/exit_codes.md).

    `defaults` are settings of the script, which recipes and flags replace.
    """
    stop = StopRequest()
    stop.watch()
    outlive_readers()
    environment, met = LaunchEnvironment.alone(), False
    try:
        environment = read_environment()
        stop.rank = environment.rank
        watch_launcher(environment.launcher)
        prepared = _prepared(argv, prog, defaults, environment)
        met = True  # from here on the others know when this rank fails
        code = _run(prepared, environment, stop)
    except Exception as error:
        if not met and environment.rank > 0:
            _tell_others(error, environment, stop)
        code = report_failure(error, environment.rank, stop)
        if not met and environment.rank == 0:
            _tell_others(error, environment, stop)
    leave(code)


@dataclass(frozen=True)
class _Prepared:
    """What a rank has found before it meets the others."""

    config: RunConfig
    notes: list[str]
    facts: "Facts"
    device: "torch.device"


def _prepared(
    argv: Sequence[str] | None, prog: str | None, defaults: Mapping[str, str], environment: LaunchEnvironment
) -> _Prepared:
    """All that a rank can do, and find wrong, by itself: the configuration, torch, its device, what it sees."""
    config, sources, notes = _checked(argv, prog, defaults, environment)
    threads = prepare_process(environment, deterministic=config.training.deterministic_mode)
    import torch

    from megalm.agreed_facts import agreed_facts
    from megalm.distributed.context import chosen_device

    torch.set_num_threads(threads)
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    device = chosen_device(config.parallel, environment)
    config, done = without_done_commands(config, environment.restart)
    return _Prepared(
        config, [*notes, *done], agreed_facts(config, sources, environment.world_size, device.type), device
    )


def _tell_others(error: Exception, environment: LaunchEnvironment, stop: StopRequest) -> None:
    """The other ranks, which would wait for this one, end with its error; alone it needs no torch for that."""
    if environment.world_size > 1 and isinstance(error, MegalmError):
        stop.leave_with(error.exit_code)  # the launcher may end this rank meanwhile
        from megalm.distributed.agreement import tell_others

        tell_others(error, environment)


def _checked(
    argv: Sequence[str] | None, prog: str | None, defaults: Mapping[str, str], environment: LaunchEnvironment
) -> tuple[RunConfig, dict[str, str], list[str]]:
    """The configuration with its sources, and all its problems found before a process group or a GPU is touched."""
    if environment.rank != 0 and argv is None and {"--help", "-h", "--print-config"} & set(sys.argv):
        sys.exit(0)  # rank 0 prints it
    try:
        loaded = load(sys.argv[1:] if argv is None else argv, prog, defaults)
        return loaded.on_ranks(environment.world_size), loaded.sources, loaded.notes
    except ConfigError as error:
        # all ranks of a machine have the same flags and files, and MPICH's mpirun leaves them the time to say so
        error.silent = environment.local_rank > 0
        raise


def _run(prepared: _Prepared, environment: LaunchEnvironment, stop: StopRequest) -> int:
    """Meet the other ranks, train, leave the process group."""
    import torch.distributed as dist

    from megalm.distributed.agreement import meet
    from megalm.distributed.context import join_job
    from megalm.distributed.process_group import stop_process_group

    config = prepared.config
    store = meet(environment, prepared.facts, config.parallel.distributed_timeout_minutes)
    context = join_job(config.parallel, environment, prepared.device, store)
    import_modules(config.extensions.import_module)

    from megalm.checkpoint.run_folder import open_run_folder
    from megalm.monitor.log import start_logging
    from megalm.training import pretrain

    with open_run_folder(config.checkpoint, context, command_of(config)) as folder:
        log = start_logging(environment.rank, folder / "logs" if folder else None)
        for note in [
            *prepared.notes,
            *filter(None, [environment.note, grace_note(environment.launcher, config.checkpoint.save)]),
        ]:
            log.info(note)
        code = pretrain(config, context, stop)
        if code:
            # the first rank to exit makes the launcher end the others; they are to end by themselves, with this code
            dist.barrier()
        stop_process_group()
    return code
