"""What a rank finds by itself before it meets the others: the configuration, and that it can run here."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalm.checkpoint.fresh import without_done_commands
from megalm.config.merging.load import load
from megalm.config.sections import RunConfig
from megalm.distributed.environment import LaunchEnvironment, prepare_process
from megalm.errors import ConfigError, MegalmError
from megalm.resilience.signals import StopRequest

if TYPE_CHECKING:
    import torch

    from megalm.distributed.agreement import Facts


@dataclass(frozen=True)
class Prepared:
    """What a rank has found."""

    config: RunConfig
    notes: list[str]
    facts: "Facts"
    device: "torch.device"


def prepare(
    argv: Sequence[str] | None, prog: str | None, defaults: Mapping[str, str], environment: LaunchEnvironment
) -> Prepared:
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
    _check_teacher(config, environment)
    device = chosen_device(config.parallel, environment)
    config, done = without_done_commands(config, environment.restart)
    return Prepared(config, [*notes, *done], agreed_facts(config, sources, environment.world_size, device.type), device)


def tell_others_of(error: Exception, environment: LaunchEnvironment, stop: StopRequest) -> None:
    """The other ranks, which would wait for this one, end with its error; alone it needs no torch for that."""
    if environment.world_size > 1 and isinstance(error, MegalmError):
        stop.leave_with(error.exit_code)  # the launcher may end this rank meanwhile
        from megalm.distributed.agreement import tell_others

        tell_others(error, environment)


def _check_teacher(config: RunConfig, environment: LaunchEnvironment) -> None:
    """Find the teacher before anybody is met; all ranks of a machine see the same."""
    if config.distillation.teacher_load is None:
        return
    from megalm.distillation import find_teacher

    try:
        find_teacher(config)
    except MegalmError as error:
        error.silent = environment.local_rank > 0
        raise


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
