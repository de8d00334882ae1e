"""Every layout trains like one process: losses and gradient norms of five steps, and all weights after them."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from spawner import run_on_ranks

from megalm.assembly import Place, build_model_and_engine, mesh_of
from megalm.config import check_layout, load_config
from megalm.config.pipeline import SCHEDULES
from megalm.dist.mesh import Axis
from megalm.models.randomness import stable_seed

STEPS = 5
SAMPLES, SEQ, VOCAB = 8, 16, 61
RUN = (
    f"--num-layers 2 --hidden-size 32 --vocab-size {VOCAB} --make-vocab-size-divisible-by 8 --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --global-batch-size {SAMPLES} --train-iters {STEPS} --lr 0.01 --weight-decay 0.1 "
    "--clip-grad 0.5 --mock-data --eval-iters 0 --micro-batch-size 2 "
)
MODELS = {
    # tied head, two KV heads, vocabulary 61
    "llama": "--num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu --disable-bias-linear "
    "--position-embedding-type rope --normalization RMSNorm",
    # biases everywhere, learned positions, own head
    "gpt2": "--num-attention-heads 4 --ffn-hidden-size 48 --untie-embeddings-and-output-weights --openai-gelu",
    # one KV head, norms of heads, biases on q, k and v only; with 8 ranks whole ranks of padding
    "qwen": "--num-attention-heads 4 --num-query-groups 1 --ffn-hidden-size 64 --swiglu --disable-bias-linear "
    "--add-qkv-bias --qk-layernorm --position-embedding-type rope --normalization RMSNorm",
}
MODELS["deep llama"] = MODELS["llama"] + " --num-layers 4"
MODELS["deep gpt2"] = MODELS["gpt2"] + " --num-layers 4 --hidden-dropout 0.1 --attention-dropout 0.1"
MODELS["uneven llama"] = MODELS["llama"] + " --num-layers 5"
MODELS["eight layers"] = MODELS["gpt2"] + " --num-layers 8"
MODELS["dropout"] = MODELS["gpt2"] + " --hidden-dropout 0.2"


@dataclass(frozen=True)
class Row:
    """One layout of one model; `ci` rows run always, the others with --all-layouts."""

    ranks: int
    model: str
    flags: str
    of_losses: float
    """Largest relative difference of losses and gradient norms."""
    of_weights: float
    """Largest relative distance (L2) of all weights together."""
    ci: bool = True


@dataclass
class Trained:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


FP32 = (1e-5, 1e-5)
# low precision rounds activations and weights at every step; Adam turns a tiny gradient's sign into a whole step
BF16 = (1e-2, 6e-2)
FP16 = (5e-3, 5e-3)
TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
PP2, MICRO1 = "--pipeline-model-parallel-size 2", "--micro-batch-size 1"
SP = "--sequence-parallel"
ROWS = [
    Row(1, "llama", "--zero-stage 0", *FP32),
    Row(2, "llama", "--zero-stage 0", *FP32),
    Row(2, "llama", f"--zero-stage 0 {TP2}", *FP32),
    Row(2, "llama", f"--zero-stage 1 {TP2}", *FP32),
    Row(2, "llama", f"--zero-stage 2 {TP2}", *FP32),
    Row(2, "llama", f"--zero-stage 3 {TP2}", *FP32),
    Row(2, "llama", f"--zero-stage 0 {TP2} {SP}", *FP32),
    Row(4, "llama", f"--zero-stage 0 {TP4}", *FP32),
    Row(4, "qwen", f"--zero-stage 0 {TP4} {SP}", *FP32),
    Row(2, "gpt2", f"--zero-stage 0 {TP2}", *FP32),
    Row(2, "gpt2", f"--zero-stage 0 {TP2} {SP}", *FP32),
    Row(2, "dropout", f"--zero-stage 0 {TP2} {SP}", *FP32),
    Row(2, "dropout", f"--zero-stage 0 {TP2}", *FP32),
    Row(4, "llama", f"--zero-stage 1 {TP2}", *FP32),
    Row(4, "llama", f"--zero-stage 2 {TP2}", *FP32),
    Row(4, "llama", f"--zero-stage 3 {TP2} {SP}", *FP32),
    *(
        Row(2, "deep llama", f"--zero-stage {stage} {PP2} --pipeline-schedule {schedule}", *FP32, ci=stage == 1)
        for stage in (0, 1)
        for schedule in SCHEDULES
    ),
    *(
        Row(4, "deep llama", f"--zero-stage {stage} {PP2} --pipeline-schedule {schedule} {MICRO1}", *FP32, ci=ci)
        for stage, schedule, ci in (
            (1, "1f1b", False),
            (1, "zbv", False),
            (2, "gpipe", False),
            (2, "1f1b", True),
            (2, "interleaved-1f1b", True),
            (2, "interleaved-zero-bubble", False),
            (2, "zbv", False),
            (2, "dualpipev", False),
            (3, "gpipe", False),
            (3, "1f1b", False),
            (3, "interleaved-1f1b", True),
        )
    ),
    *(
        Row(2, "deep gpt2", f"--zero-stage {stage} {PP2} --pipeline-schedule {schedule} {recompute}", *FP32, ci=ci)
        for stage, schedule, recompute, ci in (
            (0, "1f1b", "", False),
            (1, "zbv", "--recompute-granularity full", True),
            (0, "interleaved-zero-bubble", "--recompute-granularity selective", True),
            (3, "1f1b", "--recompute-granularity full", False),
        )
    ),
    *(
        Row(
            4,
            "eight layers",
            f"--zero-stage 1 --pipeline-model-parallel-size 4 --pipeline-schedule {s} {MICRO1}",
            *FP32,
            ci=False,
        )
        for s in SCHEDULES
    ),
    Row(4, "uneven llama", "--zero-stage 1 --pipeline-model-parallel-size 4 --pipeline-layout 0,2,2,1", *FP32),
    Row(2, "uneven llama", f"--zero-stage 2 {PP2} --pipeline-partition parameters", *FP32, ci=False),
    Row(2, "llama", f"--zero-stage 0 {PP2} --bf16", *BF16, ci=False),
    Row(2, "llama", f"--zero-stage 1 {PP2} --bf16", *BF16),
    Row(4, "llama", f"--zero-stage 2 {PP2} --bf16", *BF16, ci=False),
    Row(4, "llama", f"--zero-stage 3 {PP2} --bf16", *BF16, ci=False),
    Row(4, "llama", f"--zero-stage 1 {PP2} --fp16 --initial-loss-scale 1024 --loss-scale-window 1", *FP16, ci=False),
    *(
        Row(
            4,
            "deep llama",
            f"--zero-stage {stage} {PP2} {TP2} --pipeline-schedule {schedule}",
            *FP32,
            ci=(stage, schedule) == (1, "zbv"),
        )
        for stage in (0, 1)
        for schedule in SCHEDULES
    ),
    *(
        Row(
            8,
            "deep llama",
            f"--zero-stage {stage} {PP2} {TP2} {SP} {MICRO1} --pipeline-schedule {schedule}",
            *FP32,
            ci=False,
        )
        for stage in (0, 1)
        for schedule in SCHEDULES
    ),
]


def trained(flags: str) -> Trained:
    """Train on seeded random tokens with a ragged loss mask; the record, with whole weights."""
    config = load_config(flags.split())
    dp = check_layout(config, dist.get_world_size())
    place = Place.of(mesh_of(config, dist.get_world_size()), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, place)
    micro, accumulation = config.batch.micro_batch_size, config.batch.accumulation(dp)
    generator = torch.Generator().manual_seed(7)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
        # samples keep very different numbers of tokens, so that a mean of means would be wrong
        mask = (torch.rand(SAMPLES, SEQ, generator=generator) > torch.rand(SAMPLES, 1, generator=generator)).float()
        firsts = [(number * dp + place.groups.position(Axis.DP)) * micro for number in range(accumulation)]
        parts = [
            {"tokens": tokens[rows, :-1], "labels": tokens[rows, 1:], "loss_mask": mask[rows]}
            for rows in (slice(first, first + micro) for first in firsts)
        ]
        result = engine.train_step(parts, [stable_seed(step, "dropout", first) for first in firsts], 0.01)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trained(losses, norms, whole_weights(engine))


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Every fp32 weight, put together from the ranks' slices."""
    whole = {name: torch.zeros(placement.shape) for name, placement in engine.placements.items()}
    for piece in engine.owned_slices():
        matrix = whole[piece.name].view(piece.placement.shape[0], -1)
        for offset, part in piece.placement.part.of_range(piece.start, piece.stop):
            values = piece.weight[offset : offset + part.size].view(part.height, part.width)
            matrix[slice(*part.rows), slice(*part.columns)] += values
    for tensor in whole.values():
        dist.all_reduce(tensor)
    return whole


@cache
def one_process(model: str) -> Trained:
    return run_on_ranks(1, trained, f"{RUN} {MODELS[model]} --zero-stage 0")[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.ranks} ranks {row.model} {row.flags}")
def test_training_equals_one_process(row: Row) -> None:
    expected = one_process(row.model)
    for found in run_on_ranks(row.ranks, trained, f"{RUN} {MODELS[row.model]} {row.flags}"):
        assert found.losses == pytest.approx(expected.losses, rel=row.of_losses)
        assert found.norms == pytest.approx(expected.norms, rel=row.of_losses)
        assert distance(found.weights, expected.weights) < row.of_weights


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all weights laid end to end."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([weights[name].flatten() for name in expected]).double() for weights in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("model", MODELS)
def test_the_models_clip_and_move_their_weights(model: str) -> None:
    assert max(one_process(model).norms) > 0.5, "gradients must be large enough to be clipped"
    start = run_on_ranks(1, initial_weights, f"{RUN} {MODELS[model]}")[0]
    assert distance(one_process(model).weights, start) > 0.1, "five steps must move the weights beyond the tolerances"


def initial_weights(flags: str) -> dict[str, torch.Tensor]:
    """Weights before the first step."""
    config = load_config(flags.split())
    place = Place.of(mesh_of(config, 1), torch.device("cpu"))
    return whole_weights(build_model_and_engine(config, config.model, place))
