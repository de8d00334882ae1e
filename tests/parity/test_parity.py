"""Every layout trains like one process: losses and gradient norms of two steps, and then weights, evaluation and
generation."""

import tempfile
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import MODELS, ROWS, RUN, SAMPLES, SEQ, STEPS, TEACHER, VOCAB, WORDS, Row

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.config.rules.completion import complete_model
from megalm.config.rules.layout import check_layout
from megalm.config.sections import RunConfig
from megalm.continuation import save
from megalm.data.batch import Batch
from megalm.data.samples.sample import Sample
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.models.generation import continue_greedily
from megalm.objectives import build_objective
from megalm.randomness import stable_seed
from megalm.testing.spawner import run_on_ranks

EOD = 0


@dataclass
class Trained:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    moved: float | None
    """How far the weights are from those before the first step; of one process only."""
    evaluated: float
    logits: torch.Tensor
    text: list[int]


def trained(flags: str) -> Trained:
    """Train on seeded random tokens with a ragged loss mask, evaluate and generate."""
    config = load_config(flags.split())
    config = config.model_copy(update={"model": complete_model(config, None)})
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    dp, micro = check_layout(config, dist.get_world_size()), config.batch.micro_size
    engine = build_model_and_engine(config, config.model, context)
    start = whole_weights(engine) if dist.get_world_size() == 1 else None
    generator = torch.Generator().manual_seed(7)
    firsts = [(number * dp + context.groups.data.rank) * micro for number in range(config.batch.accumulation(dp))]
    losses, norms, parts = [], [], []
    for step in range(STEPS):
        batch = global_batch(config, generator)
        parts = [
            Batch(
                tensors={name: array[first : first + micro] for name, array in batch.items()},
                seed=stable_seed(step, "dropout", first),
            )
            for first in firsts
        ]
        result = engine.train_step(parts, 0.01)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    evaluated = engine.total_loss(engine.mean_over_ranks(engine.eval_step(parts)))
    prompt, text = [5, 3, 1], list[int]()  # no multiple of the ranks of sequence parallelism
    shown = {"tokens": torch.tensor([prompt])}
    if config.model.model_family != "gpt":  # it would see what fills them up
        shown["padding_mask"] = torch.ones(1, 3, dtype=torch.bool)
    if config.model.encoder_decoder:
        shown["decoder_tokens"] = torch.tensor([[0, 7]])
    logits = engine.logits_at(shown, [0, 1])
    if config.model.model_family == "gpt":  # the others continue no text
        text = continue_greedily(engine.next_logits, prompt, 2, None, context.device)
    weights = whole_weights(engine)
    return Trained(losses, norms, weights, start and distance(weights, start), evaluated, logits, text)


def global_batch(config: RunConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The arrays of all samples of one step, with an end of document here and there."""
    objective = build_objective(config, _Tokenizer())
    tokens = torch.randint(0, VOCAB, (SAMPLES, objective.sample_tokens(SEQ)), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = EOD
    rows = [objective(Sample(number, 0, row)) for number, row in enumerate(tokens.numpy())]
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    # samples keep very different numbers of tokens, so that a mean of means would be wrong
    length = batch["loss_mask"].shape[1]
    mask = (torch.rand(SAMPLES, length, generator=generator) > torch.rand(SAMPLES, 1, generator=generator)).float()
    if "padding_mask" in batch:
        batch["padding_mask"][::2, -3:] = False
    return batch | {"loss_mask": batch["loss_mask"] * mask}


class _Tokenizer:
    """Its special tokens are among the random ones too."""

    def special(self, name: str) -> int | None:
        found = {"eod": EOD, "mask": 1, "cls": 2, "sep": 3, "fim_prefix": 4, "fim_middle": 5, "fim_suffix": 6}
        return found.get(name)


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Every fp32 weight, put together from the ranks' slices."""
    whole = {name: torch.zeros(shard_spec.shape) for name, shard_spec in engine.shard_specs.items()}
    for piece in engine.owned_slices():
        for offset, box in piece.shard_spec.box.of_range(piece.start, piece.stop):
            whole[piece.name][box.index()] += piece.weight[offset : offset + box.numel].view(box.sizes)
    for tensor in whole.values():
        dist.all_reduce(tensor)
    return whole


@cache
def one_process(model: str, *words: str) -> Trained:
    """One process in the row's precision, with its optimizer."""
    return run_on_ranks(1, trained, command(model, f"--zero-stage 0 {' '.join(WORDS[word] for word in words)}"))[0]


def command(model: str, flags: str) -> str:
    """A model in a layout."""
    found = f"{RUN} {MODELS[model]} {flags}"
    return found.replace("TEACHER", teacher().name) if "TEACHER" in found else found


@cache
def teacher() -> "tempfile.TemporaryDirectory[str]":
    """A run folder with a teacher."""
    folder = tempfile.TemporaryDirectory(prefix="megalm-teacher-")
    run_on_ranks(1, save_teacher, folder.name)
    return folder


def save_teacher(folder: str) -> None:
    config = load_config(f"{RUN} {TEACHER} --save {folder}".split())
    context = RankContext.of(Mesh.of_config(config.parallel, 1), torch.device("cpu"))
    engine = build_model_and_engine(config, complete_model(config, None), context)
    save(engine, config, {"tokenizer": None}, 0, [], "one process", context.device)


def expected_of(row: Row) -> Trained:
    """What the row must give."""
    return one_process(row.model, *filter(None, (row.precision, row.optimizer)))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_training_equals_one_process(row: Row) -> None:
    expected = expected_of(row)
    found = run_on_ranks(row.ranks, trained, command(row.model, row.flags))
    assert differences(found, expected, row) == []


def test_muon_on_blocks_of_matrices_trains_otherwise() -> None:
    row = Row(2, "llama", "tp2 zero0 muon", True)
    assert row in ROWS, "whole matrices train like one process"
    found = run_on_ranks(2, trained, f"{RUN} {MODELS[row.model]} {row.flags} --muon-tp-mode blockwise")
    assert distance(found[0].weights, expected_of(row).weights) > 1e-2


def differences(ranks: list[Trained], expected: Trained, row: Row) -> list[str]:
    """What is further from one process than the row may be."""
    tolerance, wrong = row.tolerance, []
    for rank, found in enumerate(ranks):
        deviations = {
            "first loss": (relative(found.losses[:1], expected.losses[:1]), tolerance.first),
            "first norm": (relative(found.norms[:1], expected.norms[:1]), tolerance.first),
            "losses": (relative(found.losses, expected.losses), tolerance.losses),
            "norms": (relative(found.norms, expected.norms), tolerance.norms),
            "weights": (distance(found.weights, expected.weights), tolerance.weights),
            "evaluation": (relative([found.evaluated], [expected.evaluated]), tolerance.losses),
            "logits": (distance({"": found.logits}, {"": expected.logits}), tolerance.logits),
        }
        for name, (deviation, bound) in deviations.items():
            if not deviation <= bound:  # nan is not
                wrong.append(f"rank {rank}: {name} differ by {deviation:.1e}, more than {bound:.0e}")
        if row.precision is None and found.text != expected.text:
            wrong.append(f"rank {rank}: text {found.text}, not {expected.text}")
    return wrong


def relative(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    one, other = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found, expected))
    return float(((one - other) / other).abs().max())


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all tensors laid end to end."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([tensors[name].flatten() for name in expected]).double() for tensors in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "row", [max((row for row in ROWS if row.model == model), key=lambda row: row.ci) for model in MODELS], ids=MODELS
)
def test_the_models_clip_and_move_their_weights(row: Row) -> None:
    """Each model for which a row runs."""
    assert max(one_process(row.model).norms) > 0.5, "gradients must be large enough to be clipped"
    assert one_process(row.model).moved > 0.03, "the steps must move the weights beyond the tolerances"
