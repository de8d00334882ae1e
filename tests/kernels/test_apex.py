"""`--use-apex`: which packages of that name are taken, and what runs on NVIDIA's. A stand-in has its interface."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernels.fused import ON_GPU
from torch import nn

from megalm.config.training import OptimizerConfig
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.optimizers.adamw import AdamSpec
from megalm.engine.optimizers.spec import Surroundings, decay_groups
from megalm.errors import PlatformError
from megalm.kernels import apex, norm
from megalm.kernels.backend import REFERENCE

NVIDIA = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch.nn.functional as F
def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input.float(), normalized_shape, weight.float(), bias.float(), eps).to(weight.dtype)
def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input.float(), normalized_shape, weight.float(), eps).to(weight.dtype)
""",
    "apex/optimizers/__init__.py": "class FusedAdam: pass",
    "apex/multi_tensor_apply/__init__.py": """
def multi_tensor_applier(kernel, skip, lists, *options):
    return kernel(2048 * 32, skip, lists, *options)
""",
    "fused_layer_norm_cuda.py": "",
    "amp_C.py": """
def multi_tensor_adam(chunk, skip, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    assert mode == 1 and bias_correction == 1 and int(skip) == 0
    for g, p, m, v in zip(*lists):
        assert g.dtype == p.dtype
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))
""",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts files on Python's path and forgets what was imported of them."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in list(sys.modules):
        if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda"):
            del sys.modules[name]


@pytest.mark.skipif(apex.missing() is None, reason="NVIDIA's apex is installed")
def test_without_apex_the_error_says_what_to_do():
    with pytest.raises(PlatformError, match=r"--use-apex\), but apex is not installed; install it from .* or leave"):
        apex.check("cuda")


def test_another_package_of_that_name_is_refused(package):
    place = package({"apex/__init__.py": "def main(): raise SystemExit"})
    with pytest.raises(PlatformError, match=rf"the package apex at {place}/apex/__init__.py is not NVIDIA's"):
        apex.check("cuda")


def test_a_package_that_fails_to_import_is_refused(package):
    package({"apex/__init__.py": "raise RuntimeError('needs a web server')"})
    with pytest.raises(PlatformError, match=r"not NVIDIA's: .* does not import \(needs a web server\)"):
        apex.check("cuda")


def test_modules_of_the_right_names_are_not_enough(package):
    package({**NVIDIA, "apex/normalization/fused_layer_norm.py": ""})
    with pytest.raises(PlatformError, match=r"without apex\.normalization\.fused_layer_norm\.mixed_dtype"):
        apex.check("cuda")


def test_apex_without_its_extensions_is_refused(package):
    package({name: text for name, text in NVIDIA.items() if name != "amp_C.py"})
    with pytest.raises(PlatformError, match="lacks its CUDA extension amp_C"):
        apex.check("cuda")


def test_apex_needs_a_gpu(package):
    package(NVIDIA)
    assert apex.missing() is None
    apex.check("cuda")
    with pytest.raises(PlatformError, match="run on CUDA devices only, not on cpu"):
        apex.check("cpu")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms_keep_dtypes_and_numbers(package, weight_dtype):
    package(NVIDIA)
    compare_norms("cpu", weight_dtype)


def compare_norms(device: str, weight_dtype: torch.dtype) -> None:
    """Apex's norms and the references, values and gradients."""
    kernels = apex.with_apex(REFERENCE)
    with torch.device(device):
        x, residual = torch.randn(2, 3, 64).bfloat16()
        start = torch.randn(2, 64).to(weight_dtype)
    found = []
    for layer_norm, rms_norm in (
        (kernels.layer_norm_after_add, kernels.rms_norm_after_add),
        (norm.layer_norm_after_add, norm.rms_norm_after_add),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, *start)]
        first, total = layer_norm(leaves[0], leaves[1], leaves[2], leaves[3], 1e-5)
        second, _ = rms_norm(total, None, leaves[2], 1e-5)
        assert first.dtype == second.dtype == x.dtype
        found.append((first, second, *torch.autograd.grad((first * second).sum(), leaves)))
    for result, expected in zip(*found, strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("sharded", [False, True])
def test_adamw_takes_the_steps_of_torchs(package, sharded):
    package(NVIDIA)
    compare_adamw("cpu", sharded)


def compare_adamw(device: str, sharded: bool) -> None:
    """Steps of both optimizers by Apex's kernel and by torch."""
    config = OptimizerConfig(lr=1e-2, adam_beta2=0.95)
    models, inputs = [], torch.randn(8, 16, device=device)
    for kernels in (apex.with_apex(REFERENCE), REFERENCE):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(device)
        groups, masters = with_masters(
            decay_groups(dict(model.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.1))
        )
        surroundings = Surroundings(zero_stage=1 if sharded else 0, kernels=kernels)
        optimizer = AdamSpec().build(groups, config, surroundings)
        if not sharded:
            optimizer = MasterWeights(optimizer, masters, clip_grad=0.1, accumulate_fp32=True, kernels=kernels)
        for _ in range(3):
            F.mse_loss(model(inputs), inputs.roll(1, 0)).backward()
            optimizer.step()
            model.zero_grad()
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        models.append(model)
    for result, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("marked", [pytest.param(True, marks=ON_GPU)])
def test_the_installed_apex(weight_dtype, marked):
    if apex.missing() is not None:
        pytest.skip(apex.missing())
    compare_norms("cuda", weight_dtype)
    for sharded in (False, True):
        compare_adamw("cuda", sharded)
