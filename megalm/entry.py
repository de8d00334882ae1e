"""From a launch script's command line to the loop: configuration first, then the ranks, then torch and DeepSpeed.

Wrong input ends here in one message from one rank. Nothing heavy is imported before the configuration is checked.
"""

import signal
import sys
from collections.abc import Sequence

from megalm.config import load
from megalm.config.sections import RunConfig
from megalm.distributed.environment import LaunchEnvironment, prepare_process, read_environment
from megalm.errors import ConfigError
from megalm.processes import outlive_readers
from megalm.resilience.launcher import watch_launcher
from megalm.resilience.reporting import leave, report_failure
from megalm.resilience.signals import StopRequest
from megalm.tables import import_modules


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run a training command line and exit: 0 when done, else the error's exit code (see docs/exit_codes.md)."""
    rank = 0
    stop = StopRequest()
    stop.listen_early()
    outlive_readers()
    try:
        environment = read_environment()
        rank = environment.rank
        watch_launcher(environment.launcher)
        config, notes = _checked(argv, prog, environment)
        threads = prepare_process(environment)
        code = _run(config, notes, environment, threads, stop)
    except Exception as error:
        code = report_failure(error, rank)
    leave(code)


def _checked(
    argv: Sequence[str] | None, prog: str | None, environment: LaunchEnvironment
) -> tuple[RunConfig, list[str]]:
    """The configuration, with all its problems found before a process group or a GPU is touched."""
    if environment.rank != 0 and argv is None and {"--help", "-h", "--print-config"} & set(sys.argv):
        sys.exit(0)  # rank 0 prints it
    try:
        loaded = load(sys.argv[1:] if argv is None else argv, prog)
        return loaded.on_ranks(environment.world_size), loaded.notes
    except ConfigError as error:
        # all ranks of a machine have the same flags and files, and MPICH's mpirun leaves them the time to say so
        error.silent = environment.local_rank > 0
        raise


def _run(config: RunConfig, notes: list[str], environment: LaunchEnvironment, threads: int, stop: StopRequest) -> int:
    """Start torch and the process group, train, leave the group."""
    import torch
    import torch.distributed as dist

    from megalm.distributed.context import join_job
    from megalm.distributed.process_group import stop_process_group

    torch.set_num_threads(threads)
    context = join_job(config.parallel, environment)
    import_modules(config.extensions.import_module)

    from megalm.checkpoint.run_folder import open_run_folder
    from megalm.monitor.log import start_logging
    from megalm.training import pretrain

    with open_run_folder(config.checkpoint, context) as folder:
        log = start_logging(environment.rank, folder / "logs" if folder else None)
        for note in [*notes, *filter(None, [environment.note])]:
            log.info(note)
        code = pretrain(config, context, stop)
        if code:
            # the first rank to exit makes the launcher end the others; they are to end by themselves, with this code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.barrier()
        stop_process_group()
    return code
