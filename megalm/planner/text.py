"""A plan as text."""

from megalm.config.deepspeed.write import zero_stage
from megalm.config.rules.loss import cross_entropy_impl, logits_bytes
from megalm.distributed.mesh import Axis, Mesh
from megalm.monitor.tables import count, gigabytes, summary
from megalm.planner.plan import MODES, Plan

GRID_RANKS = 64
"""Most ranks that the grid shows one by one."""


def describe(plan: Plan, memory_per_device: float | None) -> str:
    """The whole text; `memory_per_device` in bytes."""
    parts = [_overview(plan), _grid(plan.layout.mesh), _memory(plan), _work(plan)]
    if memory_per_device is not None:
        parts.append(fit(plan, memory_per_device))
    return "\n\n".join(parts)


def fit(plan: Plan, memory_per_device: float) -> str:
    """Whether the fullest rank fits, and if not what would make it fit."""
    peak, room = plan.peak(plan.mode), gigabytes(memory_per_device)
    if peak <= memory_per_device:
        return f"fits: {gigabytes(peak)} of {room} a device ({100 * peak / memory_per_device:.0f} %)"
    lower = [mode for mode in MODES[MODES.index(plan.mode) + 1 :] if plan.peak(mode) <= memory_per_device]
    stage = zero_stage(plan.layout.config)
    ways = [f"--recompute-granularity {lower[0]} needs {gigabytes(plan.peak(lower[0]))}"] if lower else []
    if stage < 3 and plan.layout.mesh.dp > 1:
        ways.append(f"--zero-stage {stage + 1} spreads more over {plan.layout.mesh.dp} ranks")
    if plan.layout.config.batch.micro_size > 1:
        ways.append("a smaller --micro-batch-size takes less for activations")
    ways.append("more tensor-parallel or pipeline ranks hold less of the model each")
    return f"WARNING: will not fit: {gigabytes(peak)} needed, {room} a device; " + "; ".join(ways)


def _overview(plan: Plan) -> str:
    config, layout = plan.layout.config, plan.layout
    batch, mesh = config.batch, layout.mesh
    size = batch.global_size(mesh.dp)
    tokens = size * batch.seq_length
    flops = plan.flops_per_token * tokens
    rows = [
        ("layout", f"{mesh}, ZeRO {zero_stage(config)}, {config.precision.dtype}, recompute {plan.mode}"),
        ("batch", f"{size} samples = {batch.micro_size} micro x {mesh.dp} dp x {layout.micro_batches} "
                  f"micro-batches, {count(tokens)} tokens a step"),
        ("FLOPs", f"{count(plan.flops_per_token)} a token, {count(flops)} a step, "
                  f"{count(flops / mesh.world_size)} a step and rank"),
    ]  # fmt: skip
    return summary("megalm plan", rows)


def _grid(mesh: Mesh) -> str:
    """Ranks of each stage: a row for each data- and context-parallel place, neighbours are tensor-parallel."""
    lines = ["rank grid (rows: dp, cp; columns: tp)"]
    shown = 0
    for pp in range(mesh.pp):
        for dp in range(mesh.dp):
            for cp in range(mesh.cp):
                if shown + mesh.tp > GRID_RANKS:
                    lines.append(f"  ... {mesh.world_size - shown} more ranks in the same order")
                    return "\n".join(lines)
                ranks = [mesh.rank({Axis.PP: pp, Axis.DP: dp, Axis.CP: cp, Axis.TP: tp}) for tp in range(mesh.tp)]
                shown += mesh.tp
                lines.append(f"  pp {pp} dp {dp} cp {cp}: " + " ".join(f"{rank:>3}" for rank in ranks))
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    """One row a pipeline rank; activations and the peak for every recompute granularity."""
    head = ["pp", "layers", "parameters", "weights", "optimizer", "gradients", "buffers"]
    head += [f"activations {mode}" for mode in MODES] + [f"peak {mode}" for mode in MODES]
    rows = [head]
    for number, rank in enumerate(plan.ranks):
        state, layers = rank.memory[plan.mode].state, rank.layers
        rows.append([
            str(number), _spans(layers), count(rank.parameters), gigabytes(state.weights),
            gigabytes(state.master + state.moments), gigabytes(state.gradients_at_end),
            gigabytes(state.pass_bucket + state.end_bucket + state.gathered + state.fetched),
            *(gigabytes(rank.memory[mode].step.saved) for mode in MODES),
            *(gigabytes(rank.memory[mode].peak) for mode in MODES),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    config = plan.layout.config
    note = f"loss {cross_entropy_impl(config)}: logits of one micro-batch {gigabytes(logits_bytes(config))}, "
    if cross_entropy_impl(config) == "linear":
        note += "never held as a whole"
    else:
        note += "their gradient the same (in the activations)"
    if remembered := max(rank.memory[plan.mode].state.remembered for rank in plan.ranks):
        note += f"\n  the {config.model.segment_memory} positions before each row (--segment-memory): "
        note += f"{gigabytes(remembered)}, in the peaks"
    if config.distillation.teacher_load is not None:
        note += "\n  a teacher (--teacher-load) comes on top of the peaks: its weights, cut over the tensor-parallel "
        note += "ranks, its logits, and one gradient of logits more"
    return "\n".join(["memory of each rank, by pipeline rank", *(f"  {line}" for line in lines), f"  {note}"])


def _spans(layers: tuple[int, ...]) -> str:
    """Layer numbers as runs: 0-3,12-15."""
    runs: list[list[int]] = []
    for number in layers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def _work(plan: Plan) -> str:
    layout = plan.layout
    sent = ", ".join(f"{axis} {gigabytes(size)}" for axis, size in plan.sent.items())
    rows = [("sent by a rank", f"{sent} a step")]
    if layout.mesh.pp > 1:
        text = (
            f"{layout.pipeline.schedule}, {layout.micro_batches} micro-batches over {layout.mesh.pp} ranks x "
            f"{layout.chunks} stages: bubble {100 * plan.step.bubble:.1f} %, at most {max(plan.step.in_flight):g} of "
            f"{layout.micro_batches} micro-batches in flight"
        )
        rows.append(("pipeline", text))
    else:
        rows.append(("pipeline", "one stage: no bubble"))
    return summary("work of a step", rows)
