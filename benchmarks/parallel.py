"""What each layout costs and saves on the CPU of one machine, as ratios within one run.

    python benchmarks/parallel.py            # or: make bench-parallel
    python benchmarks/parallel.py --quick    # a smaller model, fewer steps: does it run?
    python benchmarks/parallel.py --only zbv # rows with this text in their name

Step time: every layout on 2 ranks with 1 thread each, against 1 rank with 2 threads, the same global batch; A B A B,
the least of the medians. Pipelines: the share of time in which ranks wait, beside the bubble that `megalm plan`
simulates. DP=2 does the same work a rank without a bubble (but for a larger optimizer step), so measured is
1 - DP step / PP step.
Memory: the peak of tensors on a rank, and what stands between steps, beside the theory of `megalm plan`.
"""

import argparse
import gc
import os
import statistics
import time

import torch

from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.planner.plan import make_plan
from megalm.planner.schedule import StepTimes
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

SMALL = "--num-layers 8 --hidden-size 256 --num-attention-heads 8 --vocab-size 4096 --seq-length 128"
TINY = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 512 --seq-length 32"
REST = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 100 --lr 0.001 --mock-data --eval-iters 0"
)
ONE = "--zero-stage 0"
TIMED = {
    "TP 2": "--zero-stage 0 --tensor-model-parallel-size 2",
    "TP 2 + SP": "--zero-stage 0 --tensor-model-parallel-size 2 --sequence-parallel",
    "DP 2": "--zero-stage 0",
    "PP 2 gpipe": "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule gpipe",
    "PP 2 1f1b": "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule 1f1b",
    "PP 2 interleaved-1f1b": "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule interleaved-1f1b",
    "PP 2 interleaved-zero-bubble":
        "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule interleaved-zero-bubble",
    "PP 2 zbv": "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule zbv",
    "PP 2 dualpipev": "--zero-stage 0 --pipeline-model-parallel-size 2 --pipeline-schedule dualpipev",
}  # fmt: skip
MEMORY = {
    "ZeRO 0, 1 rank": (1, "--zero-stage 0"),
    "ZeRO 1, 2 ranks": (2, "--zero-stage 1"),
    "ZeRO 2, 2 ranks": (2, "--zero-stage 2"),
    "ZeRO 3, 2 ranks": (2, "--zero-stage 3"),
    "TP 2": (2, "--zero-stage 0 --tensor-model-parallel-size 2"),
}
MEMORY_RUNS = 4
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}}


def configured(flags: str) -> RunConfig:
    """The run of a row."""
    config = load_config(flags.split())
    engine = config.engine.model_copy(update={"deepspeed_config": BUCKETS})
    return config.model_copy(update={"engine": engine})


def build(config: RunConfig):
    """The engine of a row on this rank, and its micro-batches of one step."""
    from megalm.assembly import build_model_and_engine
    from megalm.distributed.context import RankContext
    from megalm.distributed.mesh import Axis, Mesh

    context = RankContext.of(Mesh.of_config(config.parallel, torch.distributed.get_world_size()), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, context)
    rows, length = config.batch.micro_batch_size, config.batch.seq_length
    count = config.batch.accumulation(context.mesh.size(Axis.DP))
    generator = torch.Generator().manual_seed(context.groups.data.rank)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, config.model.vocab_size or 1, (rows, length + 1), generator=generator)
        batches.append(batch_of(tokens[:, :-1], tokens[:, 1:]))
    return engine, batches


def step_times(flags: str, steps: int, threads: int) -> list[float]:
    """Seconds of each step but the first two."""
    torch.set_num_threads(threads)
    engine, batches = build(configured(flags))
    times = []
    for _ in range(steps + 2):
        torch.distributed.barrier()
        begin = time.perf_counter()
        engine.train_step(batches, 1e-3)
        times.append(time.perf_counter() - begin)
    return times[2:]


def peak_and_state(flags: str) -> tuple[int, int]:
    """The most that tensors took on this rank in two steps, and what is left between steps."""
    from megalm.monitor.tensor_memory import TensorMemory

    with TensorMemory() as memory:
        engine, batches = build(configured(flags))
        for _ in range(2):
            engine.train_step(batches, 1e-3)
            gc.collect()
    return memory.peak_bytes, memory.final_bytes


def measured(ranks: int, flags: str, steps: int, threads: int) -> float:
    """The median step of the slowest rank, in seconds."""
    return max(statistics.median(times) for times in run_on_ranks(ranks, step_times, flags, steps, threads))


def compare_step_times(base: str, steps: int, rounds: int, only: str) -> None:
    """One row a layout: time against one rank with as many threads, and the bubble of pipelines."""
    timed = {name: flags for name, flags in TIMED.items() if only in name}
    if not timed:
        return
    print(f"{'layout':30} {'1 rank s':>9} {'2 ranks s':>9} {'ratio':>6}  bubble measured / simulated")
    for name, flags in timed.items():
        ones, twos, works = [], [], []
        for _ in range(rounds):
            ones.append(measured(1, f"{base} {ONE}", steps, 2))
            twos.append(measured(2, f"{base} {flags}", steps, 1))
            if name.startswith("PP"):
                works.append(measured(2, f"{base} {ONE}", steps, 1))
        one, two = min(ones), min(twos)
        bubble = ""
        if works:
            simulated = make_plan(configured(f"{base} {flags}"), 2, StepTimes(), ()).step.bubble
            bubble = f"{100 * (1 - min(works) / two):5.1f} % / {100 * simulated:4.1f} %"
        print(f"{name:30} {one:9.3f} {two:9.3f} {two / one:6.2f}  {bubble}", flush=True)


def compare_memory(base: str, only: str) -> None:
    """One row a layout: peak of tensors and what stands between steps, against the prediction."""
    rows = {f"memory, {name}": row for name, row in MEMORY.items() if only in f"memory, {name}"}
    if not rows:
        return
    columns = ("peak MB", "predicted", "ratio", "standing", "predicted", "ratio")
    print(f"\n{'memory of a rank':30}", *(f"{column:>9}" for column in columns))
    for name, (ranks, flags) in rows.items():
        # a measurement may be too high, never too low (see TensorMemory)
        runs = [run_on_ranks(ranks, peak_and_state, f"{base} {flags}") for _ in range(MEMORY_RUNS)]
        peak, standing = (min(max(rank[part] for rank in run) for run in runs) / 1e6 for part in (0, 1))
        plan = make_plan(configured(f"{base} {flags}"), ranks, StepTimes(), ("none",))
        state = plan.ranks[0].memory["none"].state
        wanted, state_wanted = plan.peak("none") / 1e6, (state.standing + state.gathered) / 1e6
        print(
            f"{name:30} {peak:9.1f} {wanted:9.1f} {peak / wanted:9.2f} {standing:9.1f} {state_wanted:9.1f} "
            f"{standing / state_wanted:9.2f}", flush=True,
        )  # fmt: skip


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    arguments = parser.parse_args()
    quick, only = arguments.quick, arguments.only
    base = f"{TINY if quick else SMALL} {REST}"
    print(f"{os.cpu_count()} cores; {base}\n")
    compare_step_times(base, steps=2 if quick else 6, rounds=1 if quick else 2, only=only)
    compare_memory(base, only)


if __name__ == "__main__":
    main()
