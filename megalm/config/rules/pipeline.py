"""Pipeline schedules and their rules: how many stages a rank holds and how many micro-batches a step needs."""

from dataclasses import dataclass

from megalm.config.parallel import ParallelConfig, PipelineSchedule
from megalm.config.sections import RunConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleRule:
    """What a schedule needs, and how it works."""

    chunks: tuple[int, int | None]
    """Fewest and most stages of a rank; None: any number."""
    default_chunks: int
    v_shaped: bool = False
    """Rank r holds stages r and 2 x ranks - 1 - r, so the first and the last stage share a rank; else every
    ranks-th stage, from r on."""
    splits_backward: bool = False
    """Input and weight gradients are computed at different times."""


SCHEDULES: dict[PipelineSchedule, ScheduleRule] = {
    "gpipe": ScheduleRule(chunks=(1, 1), default_chunks=1),
    "1f1b": ScheduleRule(chunks=(1, 1), default_chunks=1),
    "interleaved-1f1b": ScheduleRule(chunks=(2, None), default_chunks=2),
    "interleaved-zero-bubble": ScheduleRule(chunks=(1, None), default_chunks=2, splits_backward=True),
    "zbv": ScheduleRule(chunks=(2, 2), default_chunks=2, v_shaped=True, splits_backward=True),
    "dualpipev": ScheduleRule(chunks=(2, 2), default_chunks=2, v_shaped=True, splits_backward=True),
}


def schedule_name(parallel: ParallelConfig) -> PipelineSchedule:
    """The schedule of the run."""
    if parallel.pipeline_schedule is not None:
        return parallel.pipeline_schedule
    several = (parallel.virtual_pipeline_size or 1) > 1 or parallel.num_layers_per_virtual_pipeline_stage is not None
    return "interleaved-1f1b" if several else "1f1b"


def chunks_per_rank(parallel: ParallelConfig, num_layers: int) -> int:
    """Stages of each pipeline rank."""
    if parallel.virtual_pipeline_size is not None:
        return parallel.virtual_pipeline_size
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        stages = num_layers // parallel.num_layers_per_virtual_pipeline_stage
        return max(1, stages // parallel.pipeline_model_parallel_size)
    return SCHEDULES[schedule_name(parallel)].default_chunks


def num_stages(parallel: ParallelConfig, num_layers: int) -> int:
    """Stages of the whole pipeline."""
    return parallel.pipeline_model_parallel_size * chunks_per_rank(parallel, num_layers)


def layout_counts(parallel: ParallelConfig) -> list[int] | None:
    """Layers of each stage as --pipeline-layout says; None if it says nothing.

    Raises ValueError where it is no list of whole numbers.
    """
    return None if parallel.pipeline_layout is None else [int(word) for word in parallel.pipeline_layout.split(",")]


def pipeline_problems(config: RunConfig) -> list[str]:
    """Everything about schedule, chunks and layout that cannot work, whatever the number of ranks and micro-batches."""
    parallel, layers = config.parallel, config.model.total_layers
    if parallel.pipeline_model_parallel_size == 1:
        return _needs_a_pipeline(parallel)
    said = config.model.said_layers
    found = _chunk_problems(parallel, layers, said)
    if found:
        return found
    stages = num_stages(parallel, layers)
    ranks = parallel.pipeline_model_parallel_size
    if parallel.pipeline_layout is not None:
        return _layout_problems(parallel, layers, stages, said)
    if stages > layers:
        chunks = stages // ranks
        given = parallel.virtual_pipeline_size is not None
        fewer = f"--virtual-pipeline-size {layers // ranks} or less" if given else "another --pipeline-schedule"
        return [
            f"pipeline_model_parallel_size={ranks} x {chunks} stages a rank = {stages} stages need a layer each, but "
            f"{said}; use at most {max(1, layers // chunks)} pipeline ranks"
            + (f", or {fewer}" if chunks > 1 and layers >= ranks else "")
        ]
    return []


def micro_batch_problems(parallel: ParallelConfig, num_layers: int, micro_batches: int) -> list[str]:
    """Numbers of micro-batches a step that the schedule cannot do."""
    ranks, name = parallel.pipeline_model_parallel_size, schedule_name(parallel)
    given = f"pipeline_schedule={name} with {micro_batches} micro-batches a step and rank"
    fix = "change --global-batch-size or --micro-batch-size (left out, it follows), or use another --pipeline-schedule"
    if ranks == 1:
        return []
    if name == "dualpipev" and micro_batches < 2 * ranks:
        return [f"{given} needs at least one for each of its {2 * ranks} stages; {fix}"]
    rounds = max(1, micro_batches // ranks)
    if name in ("interleaved-1f1b", "interleaved-zero-bubble") and micro_batches % rounds:
        nearest = f"{micro_batches // ranks * ranks} or {(micro_batches // ranks + 1) * ranks}"
        return [
            f"{given} on {ranks} pipeline ranks makes {rounds} rounds, and they must be equally long: use a multiple "
            f"of {ranks}, such as {nearest}; {fix}"
        ]
    return []


def _needs_a_pipeline(parallel: ParallelConfig) -> list[str]:
    names = ("pipeline_schedule", "virtual_pipeline_size", "num_layers_per_virtual_pipeline_stage", "pipeline_layout")
    return [
        f"{name}={value} needs a pipeline; give --pipeline-model-parallel-size or drop it"
        for name in names
        if (value := getattr(parallel, name)) is not None
    ]


def _chunk_problems(parallel: ParallelConfig, layers: int, said: str) -> list[str]:
    ranks, size = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if size is not None and parallel.virtual_pipeline_size is not None:
        return [
            f"num_layers_per_virtual_pipeline_stage={size} and virtual_pipeline_size={parallel.virtual_pipeline_size} "
            "both say how many stages a rank has; give one of them"
        ]
    if size is not None and layers % (size * ranks):
        valid = [n for n in range(1, layers + 1) if layers % (n * ranks) == 0]
        fix = f"use {' or '.join(map(str, valid))}" if valid else "give --pipeline-layout or --virtual-pipeline-size"
        return [
            f"{said} must be a multiple of num_layers_per_virtual_pipeline_stage={size} x "
            f"pipeline_model_parallel_size={ranks}; {fix}"
        ]
    name, chunks = schedule_name(parallel), chunks_per_rank(parallel, layers)
    fewest, most = SCHEDULES[name].chunks
    if fewest <= chunks <= (chunks if most is None else most):
        return []
    wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
    other = "interleaved-1f1b" if chunks > 1 else "1f1b"
    return [
        f"pipeline_schedule={name} needs {wanted} stages a rank, not {chunks}; drop --virtual-pipeline-size "
        f"(--num-layers-per-virtual-pipeline-stage) or use --pipeline-schedule {other}"
    ]


def _layout_problems(parallel: ParallelConfig, layers: int, stages: int, said: str) -> list[str]:
    given = f'pipeline_layout="{parallel.pipeline_layout}"'
    try:
        counts = layout_counts(parallel)
    except ValueError:
        counts = None
    if counts is None or min(counts) < 0:
        return [f'{given} must be numbers of layers with commas between, as "4,6,6,4"']
    found = []
    if len(counts) != stages:
        ranks = parallel.pipeline_model_parallel_size
        found.append(
            f"{given} has {len(counts)} stages; {ranks} pipeline ranks x {stages // ranks} stages each are {stages}"
        )
    if sum(counts) != layers:
        found.append(f"{given} has {sum(counts)} layers, the model {said}")
    if 0 in counts[1:-1]:
        found.append(f"{given} has an inner stage without layers; only the first and the last may have none")
    return found
