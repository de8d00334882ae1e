"""From a launch script's command line to the loop: configuration first, then the ranks, then torch and DeepSpeed.

Wrong input ends here in one message from one rank. Nothing heavy is imported before the configuration is checked.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from megalm.config import check_layout, load, with_micro_batch_size
from megalm.config.merging.load import with_sources
from megalm.config.merging.settings import Given
from megalm.config.sections import RunConfig
from megalm.distributed.environment import (
    LaunchEnvironment,
    choose_accelerator,
    prepare_process,
    read_environment,
    seconds_since_start,
)
from megalm.errors import ConfigError, LayoutError, MegalmError, PlatformError
from megalm.resilience.launcher import watch_launcher
from megalm.resilience.signals import StopRequest
from megalm.tables import import_modules

_WAIT_FOR_REPORT_S, _LONGEST_WAIT_S = 8.0, 60.0
_LOST_PEER = re.compile("Connection (closed|reset) by peer|writev .*Broken pipe")
"""What gloo raises in a rank when another one is gone: not its own fault, and no traceback of its own is of use."""
_NO_ANSWER = re.compile(r"Timed out waiting \d+ms for (send|recv) operation")
"""What gloo raises after --distributed-timeout-minutes."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run a training command line and exit: 0 when done, else the error's exit code (see docs/exit_codes.md)."""
    rank = 0
    stop = StopRequest()
    stop.listen_early()
    try:
        environment = read_environment()
        rank = environment.rank
        watch_launcher(environment.launcher)
        config, notes = _checked(argv, prog, environment)
        threads = prepare_process(environment)
        code = _run(config, notes, environment, threads, stop)
    except MegalmError as error:
        _report(error, rank)
        _leave(error.exit_code)
    except Exception as error:
        if _raised_from(error, _LOST_PEER):
            _report_lost_peer(rank)
        elif _raised_from(error, _NO_ANSWER):
            _report_no_answer(error, rank)
            _leave(PlatformError.exit_code)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        _leave(1)
    _leave(code)


def _checked(
    argv: Sequence[str] | None, prog: str | None, environment: LaunchEnvironment
) -> tuple[RunConfig, list[str]]:
    """The configuration, with all its problems found before a process group or a GPU is touched."""
    if environment.rank != 0 and argv is None and {"--help", "-h", "--print-config"} & set(sys.argv):
        sys.exit(0)  # rank 0 prints it
    try:
        loaded = load(sys.argv[1:] if argv is None else argv, prog)
        try:
            dp = check_layout(loaded.config, environment.world_size)
        except LayoutError as error:
            places = {name: Given(None, source) for name, source in loaded.sources.items()}
            raise LayoutError([with_sources(problem, places) for problem in error.problems]) from None
        return with_micro_batch_size(loaded.config, dp), loaded.notes
    except ConfigError as error:
        # all ranks of a machine have the same flags and files, and MPICH's mpirun leaves them the time to say so
        error.silent = environment.local_rank > 0
        raise


def _run(config: RunConfig, notes: list[str], environment: LaunchEnvironment, threads: int, stop: StopRequest) -> int:
    """Start torch and the process group, train, leave the group."""
    import torch
    import torch.distributed as dist

    from megalm.distributed.process_group import default_backend, rank_device, start_process_group, stop_process_group

    torch.set_num_threads(threads)
    backend = config.parallel.distributed_backend or default_backend()
    choose_accelerator(backend == "nccl")
    device = rank_device(environment, backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start_process_group(environment, backend, config.parallel.distributed_timeout_minutes)

    from megalm import assembly
    from megalm.distributed.context import RankContext
    from megalm.distributed.mesh import Mesh
    from megalm.monitor.log import start_logging
    from megalm.training import pretrain

    import_modules(config.extensions.import_module)
    context = RankContext.of(Mesh.of_config(config.parallel, environment.world_size), device)
    lock = assembly.open_run_folder(config, context)
    folder = assembly.run_folder(config)
    log = start_logging(environment.rank, folder / "logs" if folder else None)
    for note in [*notes, *filter(None, [environment.note])]:
        log.info(note)
    code = pretrain(config, context, stop)
    if code:
        # the first rank to exit makes the launcher end the others; they are to end by themselves, with the same code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
    stop_process_group()
    if lock is not None:
        lock.close()
    return code


def _report(error: MegalmError, rank: int) -> None:
    """Print the error once for the whole job.

    What every rank finds, rank 0 says; the others wait until the launcher, seeing rank 0 gone, ends them. If it does
    not, rank 0 did not have the error, and they say it themselves.
    """
    # nothing is left to be saved: the launcher may end this rank, and finds the error's code
    signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
    if error.silent or (rank != 0 and not error.local):
        # rank 0 may have come later, and be as slow: it may need as long again
        time.sleep(min(max(_WAIT_FOR_REPORT_S, 2 * seconds_since_start()), _LONGEST_WAIT_S))
    if not error.silent:
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)


def _raised_from(error: BaseException | None, pattern: re.Pattern[str]) -> bool:
    """Whether an error is of this kind, or was raised from one, as a stage of a pipeline does."""
    while error is not None and not pattern.search(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def _report_lost_peer(rank: int) -> None:
    """Say that another rank is gone, and leave the launcher time to find that rank and its exit code first."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    text = "stopped: the connection to another rank broke; that rank, or the launcher, says why"
    print(f"rank {rank} {text}", file=sys.stderr, flush=True)
    time.sleep(_WAIT_FOR_REPORT_S)


def _report_no_answer(error: Exception, rank: int) -> None:
    """Say where this rank waited for another one in vain."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/megalm/" in frame.filename]
    place = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    print(
        f"error on rank {rank}: another rank did not answer within --distributed-timeout-minutes{place}: it hangs, or "
        "the network to it is cut; the same command continues from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )


def _leave(code: int) -> None:
    """End this process at once: peers may be waiting in a collective that will never complete, and threads of torch
    take up to a second to end in good order.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
