"""Weight decay groups, and AdamW with master weights against torch's own AdamW and clipping."""

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.config.training import OptimizerConfig, PrecisionConfig
from megalm.engine.build import _build_scaler
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.optimizers.adamw import AdamSpec, adam_options
from megalm.engine.optimizers.muon import MuonSpec
from megalm.engine.optimizers.spec import Surroundings, decay_groups
from megalm.kernels.backend import REFERENCE
from megalm.models.gpt.model import GPT

CONFIG = OptimizerConfig(lr=0.01, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
OPTIONS = adam_options(CONFIG)
STYLES: list[dict[str, Any]] = [{}, {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope"}]


@pytest.mark.parametrize("style", STYLES, ids=["gpt2", "llama"])
def test_matrices_decay_and_norms_and_biases_do_not(style: dict[str, Any]) -> None:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = GPT(ModelConfig(**(sizes | {"max_position_embeddings": 8} | style)))
    decayed, plain = decay_groups(dict(model.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.3))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in decayed["params"]:
        assert "norm" not in names[parameter]
        assert names[parameter].endswith("weight")
    for parameter in plain["params"]:
        assert "norm" in names[parameter] or names[parameter].endswith("bias"), names[parameter]
    grouped = [id(parameter) for parameter in decayed["params"] + plain["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters()), "each in exactly one group"


def test_the_shape_counts_that_zero_3_has_taken_away() -> None:
    model = nn.Linear(2, 3)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    decayed, plain = decay_groups(dict(model.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.3))
    assert decayed["params"] == [model.weight]
    assert plain["params"] == [model.bias]


def test_a_group_without_parameters_is_left_out() -> None:
    assert len(decay_groups(dict(nn.Linear(2, 3, bias=False).named_parameters()), OptimizerConfig(lr=1.0))) == 1


def test_embedding_and_head_are_a_group_of_their_own_where_their_rate_is() -> None:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = GPT(ModelConfig(**sizes, max_position_embeddings=8, untie_embeddings_and_output_weights=True))
    names = dict(model.named_parameters())
    groups = decay_groups(names, OptimizerConfig(lr=1.0, decoupled_lr=2.0))
    own = [group for group in groups if group["decoupled"]]
    assert [group["decays"] for group in groups] == [True, False, True]
    assert [id(p) for p in own[0]["params"]] == [id(names[n]) for n in ("embedding.tokens.weight", "head.weight")]
    muon = MuonSpec().parameter_groups(names, OptimizerConfig(lr=1.0, optimizer="muon", decoupled_lr=2.0))
    assert [group.get("decoupled", False) for group in muon] == [False, False, False, True]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1)).to(dtype)


def replicated(model: nn.Module, *, clip_grad: float = 0.0, accumulate_fp32: bool = True, scaler: Any = None) -> Any:
    groups, models = with_masters(
        decay_groups(dict(model.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.1))
    )
    adam = AdamSpec().build(groups, CONFIG, Surroundings(zero_stage=0, kernels=REFERENCE))
    return MasterWeights(adam, models, clip_grad=clip_grad, accumulate_fp32=accumulate_fp32, scaler=scaler)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    model.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    (model(x).float().square().sum() * scale).backward()


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 1000.0])
def test_in_fp32_it_is_torchs_adamw_after_torchs_clipping(clip_grad: float) -> None:
    model = small_model()
    reference = copy.deepcopy(model)
    optimizer = replicated(model, clip_grad=clip_grad)
    expected = torch.optim.AdamW(
        decay_groups(dict(reference.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.1)),
        fused=True,
        **OPTIONS,
    )
    for seed in range(4):
        backward(model, seed)
        backward(reference, seed)
        norm = nn.utils.clip_grad_norm_(reference.parameters(), clip_grad or torch.inf)
        optimizer.step()
        expected.step()
        assert optimizer._global_grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert optimizer._global_grad_norm > 0.5, "the gradients are large enough to be clipped"
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_under_bf16_the_masters_keep_steps_that_bf16_weights_would_lose() -> None:
    model = small_model(torch.bfloat16)
    optimizer = replicated(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    first = next(model.parameters())
    before = optimizer.masters[0].clone()
    model_before = first.detach().clone()
    backward(model, 0)
    optimizer.step()
    moved = (optimizer.masters[0] - before).detach().abs()
    assert moved.median() == pytest.approx(1e-5, rel=0.3)
    assert ((first == model_before) | (moved == 0)).float().mean() > 0.9, "a step this small vanishes in bf16"
    assert torch.equal(first, optimizer.masters[0].bfloat16())


def summed_gradient(accumulate_fp32: bool) -> Tensor:
    """The gradient after one of 1 and 256 of 2^-9: each of these is lost when added to 1 in bf16."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    replicated(layer, accumulate_fp32=accumulate_fp32)
    for factor in [1.0, *[2.0**-9] * 256]:
        (layer.weight * factor).sum().backward()
    return layer.weight.grad


def test_small_gradients_add_up_in_fp32_and_are_lost_in_bf16() -> None:
    kept = summed_gradient(accumulate_fp32=True)
    assert kept.dtype == torch.float32
    assert float(kept) == 1.5
    assert float(summed_gradient(accumulate_fp32=False)) == 1.0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_as_they_are(dtype: torch.dtype, bad: float) -> None:
    model = small_model(dtype)
    optimizer = replicated(model, clip_grad=1.0)
    backward(model, 0)
    optimizer.step()
    assert not optimizer.overflow
    before = copy.deepcopy((list(model.parameters()), optimizer.masters, optimizer.state_dict()["state"]))
    backward(model, 1)
    next(model.parameters()).grad[0, 0] = bad
    optimizer.step()
    assert optimizer.overflow
    after = (list(model.parameters()), optimizer.masters, optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    backward(model, 1)
    optimizer.step()
    assert not optimizer.overflow, "the next finite gradient counts again"
    assert not torch.equal(optimizer.masters[0], before[1][0])


def fp16_scaler(**changes: Any) -> loss_scaler.DynamicLossScaler:
    settings = {"fp16": True, "initial_loss_scale": 1024.0, "loss_scale_window": 3, "hysteresis": 1}
    return _build_scaler(PrecisionConfig(**(settings | changes)))


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler asks which rank it is on before it logs."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def scales_after_each_step(settings: dict[str, Any], overflows: set[int], steps: int) -> list[float]:
    """The loss scale after each of `steps` steps, of which `overflows` have a gradient that is not finite."""
    model = small_model(torch.float16)
    optimizer = replicated(model, scaler=fp16_scaler(**settings))
    scales = []
    for step in range(steps):
        backward(model, step, optimizer.loss_scale)
        if step in overflows:
            next(model.parameters()).grad[0, 0] = torch.inf
        optimizer.step()
        assert optimizer.overflow == (step in overflows)
        scales.append(optimizer.loss_scale)
    return scales


@pytest.mark.usefixtures("_alone")
def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_window_of_good_steps() -> None:
    scales = scales_after_each_step({"loss_scale_window": 3}, {0}, 8)
    # DeepSpeed counts the window from the step after the first good one
    assert scales == [512, 512, 512, 512, 1024, 1024, 1024, 2048]


@pytest.mark.usefixtures("_alone")
def test_hysteresis_tolerates_overflows_before_the_scale_halves() -> None:
    assert scales_after_each_step({"hysteresis": 2}, {0, 1}, 3) == [1024, 512, 512]


def test_a_fixed_loss_scale_stays() -> None:
    optimizer = replicated(model := small_model(torch.float16), scaler=fp16_scaler(loss_scale=64.0))
    backward(model, 0)
    next(model.parameters()).grad[0, 0] = torch.inf
    optimizer.step()
    assert optimizer.overflow
    assert optimizer.loss_scale == 64


def test_the_loss_scale_changes_neither_norm_nor_update() -> None:
    results = []
    for scale in (1.0, 4096.0):
        model = small_model(torch.float16)
        optimizer = replicated(model, clip_grad=0.5, scaler=fp16_scaler(loss_scale=scale))
        backward(model, 0, scale)
        optimizer.step()
        results.append((optimizer._global_grad_norm, optimizer.masters))
    (plain_norm, plain), (scaled_norm, scaled) = results
    assert scaled_norm == pytest.approx(plain_norm, rel=2e-3)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
