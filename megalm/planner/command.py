"""`megalm plan`: the run's flags and recipes in, its plan out; starts no process and leaves DeepSpeed alone."""

import argparse
import sys

from megalm.config.merging.load import load
from megalm.config.ranges import Range
from megalm.config.rules.completion import complete_model
from megalm.config.sections import RunConfig
from megalm.errors import DataError

TAKES_RUN_FLAGS = True
"""Every flag of a launch script is understood too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm plan` beside those of a run."""
    parser.add_argument(
        "--world-size", type=Range(1), metavar="N", help="number of ranks (default: one copy of the model)"
    )
    parser.add_argument(
        "--memory-per-device",
        type=Range(0, 1e9, whole=False),
        metavar="GB",
        help="warn if a rank needs more (1 GB = 1e9)",
    )
    parser.add_argument(
        "--forward-ms",
        type=Range(1e-6, 1e9, whole=False),
        default=1.0,
        metavar="X",
        help="time of a stage's forward pass (default 1)",
    )
    parser.add_argument(
        "--backward-ms",
        type=Range(1e-6, 1e9, whole=False),
        metavar="X",
        help="time of its backward pass (default: twice the forward's)",
    )
    parser.epilog = "All flags of the launch scripts are understood: --config RECIPE, --tensor-model-parallel-size, ..."


def run(arguments: argparse.Namespace, run_flags: list[str]) -> int:
    """Print the plan; 0 when it fits, 1 when it will not."""
    loaded = load(run_flags, "megalm plan")
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    parallel = loaded.config.parallel
    one = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    world = arguments.world_size or one
    config = loaded.on_ranks(world)

    from megalm.planner.plan import make_plan  # imports torch: after the configuration is known to be good
    from megalm.planner.schedule import StepTimes
    from megalm.planner.text import describe

    backward = 2 * arguments.forward_ms if arguments.backward_ms is None else arguments.backward_ms
    plan = make_plan(_complete(config), world, StepTimes(forward=arguments.forward_ms, backward=backward))
    room = None if arguments.memory_per_device is None else arguments.memory_per_device * 1e9
    print(describe(plan, room))
    return 1 if room is not None and plan.peak(plan.mode) > room else 0


def _complete(config: RunConfig) -> RunConfig:
    """The run with its vocabulary size; a tokenizer is read only where the size is not given."""
    from megalm.data.tokenizers import build_tokenizer
    from megalm.tables import import_modules

    import_modules(config.extensions.import_module)
    wanted = config.tokenizer.is_given and not config.model.vocab_size
    try:
        vocab_size = build_tokenizer(config.tokenizer).vocab_size if wanted else None
    except DataError as error:
        raise DataError(f"{error}; a plan needs no tokenizer where --vocab-size N is given") from error
    return config.model_copy(update={"model": complete_model(config, vocab_size)})
