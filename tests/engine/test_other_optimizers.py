"""Lion is its paper's formula; Muon is torch's on matrices of layers, in one process and on shards; AdamW the rest."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.config.model import ModelConfig
from megalm.config.training import OptimizerConfig
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.distributed.shards import ShardSpec
from megalm.engine.optimizers import OPTIMIZERS
from megalm.engine.optimizers.muon import Muon, orthogonalizes
from megalm.engine.optimizers.newton_schulz import COEFFICIENTS, orthogonal_factor, update_scale
from megalm.engine.optimizers.spec import StatePart, Surroundings
from megalm.kernels.backend import REFERENCE
from megalm.models.gpt.model import GPT
from megalm.tables import import_modules
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

ALONE = Surroundings(zero_stage=0, kernels=REFERENCE)
STEPS = 4


def parameters() -> dict[str, nn.Parameter]:
    """Two matrices of a layer, wide and tall, and what Muon leaves to AdamW."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "embedding.tokens.weight": (7, 6),
        "layers.0.wide.weight": (4, 6),
        "layers.0.tall.weight": (9, 4),
        "layers.0.norm.weight": (6,),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def gradients(step: int, shapes: list[torch.Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def stepped(name: str, config: OptimizerConfig) -> dict[str, Tensor]:
    """All parameters after some steps of one process."""
    found = parameters()
    spec = OPTIMIZERS[name]
    optimizer = spec.build(spec.parameter_groups(found, config), config, ALONE)
    if isinstance(optimizer, Muon):
        optimizer.place([whole(part, parameter) for part, parameter in found.items()])
    for step in range(STEPS):
        for parameter, gradient in zip(found.values(), gradients(step, [p.shape for p in found.values()]), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for part, parameter in found.items():
        kinds = spec.state_kinds(part, tuple(parameter.shape))
        assert set(optimizer.state[parameter]) - {"step"} == set(kinds)
    return {part: parameter.detach() for part, parameter in found.items()}


def whole(name: str, parameter: nn.Parameter) -> StatePart:
    shape = tuple(parameter.shape)
    return StatePart(
        name=name,
        shard_spec=ShardSpec.of_whole(shape),
        shape=shape,
        tensor=parameter,
        offset=0,
        start=0,
        stop=parameter.numel(),
    )


def test_lion_is_the_formula_of_its_paper() -> None:
    config = OptimizerConfig(optimizer="lion", lr=0.01, weight_decay=0.1, lion_beta1=0.8, lion_beta2=0.95)
    found, expected = stepped("lion", config), parameters()
    moments = {name: torch.zeros_like(parameter) for name, parameter in expected.items()}
    with torch.no_grad():
        for step in range(STEPS):
            given = gradients(step, [p.shape for p in expected.values()])
            for (name, weight), gradient in zip(expected.items(), given, strict=True):
                decay = 0.1 if weight.ndim == 2 else 0.0
                direction = torch.sign(0.8 * moments[name] + 0.2 * gradient)
                weight -= 0.01 * (direction + decay * weight)
                moments[name] = 0.95 * moments[name] + 0.05 * gradient
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-6, atol=1e-6)


@pytest.fixture
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Newton-Schulz steps in fp32, as ours on a CPU."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)


@pytest.mark.usefixtures("_in_fp32")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "theirs"),
    [
        ({"muon_scale_mode": "shape_scaling"}, "original"),
        ({"muon_scale_mode": "spectral", "muon_extra_scale_factor": 0.2}, "match_rms_adamw"),
    ],
)
def test_muon_is_torchs_and_adamw_the_rest(nesterov: bool, scale: dict[str, Any], theirs: str) -> None:
    config = OptimizerConfig(optimizer="muon", lr=0.02, weight_decay=0.1, muon_nesterov=nesterov, **scale)
    found, expected = stepped("muon", config), parameters()
    matrices = [parameter for name, parameter in expected.items() if orthogonalizes(name, tuple(parameter.shape))]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=theirs)
    embedding, norm = expected["embedding.tokens.weight"], expected["layers.0.norm.weight"]
    adamw = torch.optim.AdamW(
        [{"params": [embedding], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}], lr=0.02
    )
    for step in range(STEPS):
        given = gradients(step, [p.shape for p in expected.values()])
        for parameter, gradient in zip(expected.values(), given, strict=True):
            parameter.grad = gradient
        muon.step()
        adamw.step()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-5, atol=1e-6)


def test_muon_takes_every_matrix_of_the_layers_and_nothing_else() -> None:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = GPT(ModelConfig(**(sizes | {"max_position_embeddings": 8, "untie_embeddings_and_output_weights": True})))
    named = dict(model.named_parameters())
    config = OptimizerConfig(optimizer="muon", lr=0.01, weight_decay=0.3)
    groups = OPTIMIZERS["muon"].parameter_groups(named, config)
    names = {parameter: name for name, parameter in named.items()}
    found = [[names[parameter] for parameter in group["params"]] for group in groups]
    assert all(name.startswith("layers.") and name.endswith("weight") and "norm" not in name for name in found[0])
    assert sorted(found[1]) == ["embedding.positions.weight", "embedding.tokens.weight", "head.weight"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]
    assert sorted(name for group in found for name in group) == sorted(named)


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
def test_the_factor_has_singular_values_near_one(kind: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal_factor(matrix, COEFFICIENTS[kind], 5))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(
            (u @ v).flatten(), orthogonal_factor(matrix, COEFFICIENTS[kind], 5).flatten(), dim=0
        )
        > 0.97
    )


def factor_by_sums(dim: int) -> float:
    """How far the factor from shards cut in `dim` is from the whole one; ranks 0 and 1 hold the same shard."""
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    rank = dist.get_rank()
    size = matrix.shape[dim] // 2
    first = size if rank == 2 else 0
    steps = (COEFFICIENTS["quintic"], 5)
    shard = matrix.narrow(dim, first, size)
    found = orthogonal_factor(shard, *steps, dim=dim, group=dist.group.WORLD, counted=rank != 1)
    return float((found - orthogonal_factor(matrix, *steps).narrow(dim, first, size)).abs().max())


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_that_sum_their_products_find_the_factor_of_the_whole(dim: int) -> None:
    assert max(run_on_ranks(3, factor_by_sums, dim)) < 2e-6


@pytest.mark.parametrize(("mode", "expected"), [("spectral", 3.0), ("unit_rms_norm", 2 / 3), ("shape_scaling", 1.0)])
def test_the_scales_of_a_wide_matrix(mode: Any, expected: float) -> None:
    assert update_scale((4, 9), mode) == pytest.approx(expected)


def documented(folder: str) -> tuple[str, bool, set[str]]:
    """A step of the optimizer that docs/optimizers.md adds: its name, whether it moved weights, and its state."""
    sys.path.insert(0, folder)
    import_modules(["documented_optimizer"])
    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 32 --seq-length 8 --micro-batch-size 2 "
        "--max-position-embeddings 8 --train-iters 1 --lr 0.01 --mock-data --eval-iters 0 --zero-stage 1 "
        "--import-module documented_optimizer --optimizer sgd"
    )
    config = load_config(flags.split())
    engine = build_model_and_engine(config, config.model, RankContext.of(Mesh.of(1), torch.device("cpu")))
    before = [piece.weight.clone() for piece in engine.state_slices()]
    tokens = torch.randint(0, 32, (2, 9))
    engine.train_step([batch_of(tokens[:, :-1], tokens[:, 1:], seed=0)], 0.1)
    after = engine.state_slices()
    moved = all(not torch.equal(old, piece.weight) for old, piece in zip(before, after, strict=True))
    return engine.optimizer_name, moved, set(after[0].moments)


def test_the_documented_optimizer_trains_from_outside_the_package(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text()
    (tmp_path / "documented_optimizer.py").write_text(page.split("```python\n")[1].split("```")[0])
    found = run_on_ranks(1, documented, str(tmp_path))
    assert found == [("SGD in DeepSpeed's DeepSpeedZeroOptimizer", True, {"momentum_buffer"})]
