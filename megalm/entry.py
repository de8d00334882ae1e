"""From a launch script's command line to the loop: configuration first, then the ranks, then torch and DeepSpeed.

Wrong input ends here in one message from one rank. Nothing heavy is imported before the configuration is checked.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megalm.checkpoint.fresh import command_of
from megalm.distributed.environment import LaunchEnvironment, read_environment
from megalm.preparation import Prepared, prepare, tell_others_of
from megalm.processes import importing, outlive_readers
from megalm.resilience.launcher import grace_note, watch_launcher
from megalm.resilience.reporting import leave, report_failure
from megalm.resilience.signals import StopRequest
from megalm.tables import import_modules


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
        with importing():
            prepared = prepare(argv, prog, defaults, environment)
            met = True  # from here on the others know when this rank fails
            code = _run(prepared, environment, stop)
    except Exception as error:
        if not met and environment.rank > 0:
            tell_others_of(error, environment, stop)
        code = report_failure(error, environment.rank, stop)
        if not met and environment.rank == 0:
            tell_others_of(error, environment, stop)
    leave(code)


def _run(prepared: Prepared, environment: LaunchEnvironment, stop: StopRequest) -> int:
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
        notes = [*prepared.notes, environment.note, grace_note(environment.launcher, config.checkpoint.save)]
        for note in filter(None, notes):
            log.info(note)
        code = pretrain(config, context, stop)
        if code:
            # the first rank to exit makes the launcher end the others; they are to end by themselves, with this code
            dist.barrier()
        stop_process_group()
    return code
