"""A model that trains with the fused kernels against the same model with the references."""

import pytest
import torch
import torch.nn.functional as F
from kernels.fused import ON_GPU, needs_fused

from megalm.config.model import ModelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.config.training import OptimizerConfig
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.optimizers.adamw import AdamSpec
from megalm.engine.optimizers.spec import Surroundings, decay_groups
from megalm.kernels.backend import FUSED, REFERENCE
from megalm.kernels.building import library
from megalm.kernels.cross_entropy import fused_cross_entropy
from megalm.kernels.linear_cross_entropy import linear_cross_entropy
from megalm.models.blocks.operators import use_kernels
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT
from megalm.monitor.tensor_memory import TensorMemory
from megalm.parallel.recompute import apply_recompute
from megalm.testing.batches import token_losses

pytestmark = needs_fused
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 24,
}
LLAMA = {
    "num_query_groups": 2,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "qk_layernorm": True,
}
GPT2 = {"openai_gelu": True, "apply_layernorm_1p": True}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request):
    """Where the model trains."""
    library.load("fused", request.param)
    return torch.device(request.param)


def losses_of(kernels, options, dtype, device, steps=6):
    """Losses and gradient norms of some steps on one batch."""
    config = ModelConfig(**SIZES, **options)
    model = GPT(config)
    initialize(model, config, 1)
    use_kernels(model, kernels)
    model.to(device, dtype)
    groups, models = with_masters(
        decay_groups(dict(model.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.1))
    )
    adam = AdamSpec().build(
        groups, OptimizerConfig(lr=3e-3, adam_beta2=0.95), Surroundings(zero_stage=0, kernels=kernels)
    )
    optimizer = MasterWeights(adam, models, clip_grad=0.5, accumulate_fp32=True, kernels=kernels)
    tokens = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for _ in range(steps):
        loss = token_losses(model, tokens, tokens.roll(-1, 1)).mean()
        loss.backward()
        optimizer.step()
        found.append([float(loss.detach()), optimizer._global_grad_norm])
        for parameter in model.parameters():
            parameter.grad = None
    return torch.tensor(found)


@pytest.mark.parametrize("options", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_training_is_that_of_the_references(options, dtype, tolerance, device):
    fused, reference = (losses_of(kernels, options, dtype, device) for kernels in (FUSED, REFERENCE))
    torch.testing.assert_close(fused, reference, rtol=tolerance, atol=0)
    assert fused[-1, 0] < fused[0, 0] - 0.5


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("lengths", [[24], [5, 19]], ids=["one document", "two documents"])
def test_recomputation_gives_the_same_bits(granularity, lengths):
    """In bfloat16, where attention may be a kernel of ours."""
    config = ModelConfig(**SIZES, **LLAMA)
    tokens = torch.arange(48).view(2, 24)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    boundaries = F.pad(ends, (0, 25 - len(ends)), value=24).expand(2, 25)
    found = []
    for recompute in (False, True):
        model = GPT(config)
        initialize(model, config, 1)
        model.to(torch.bfloat16)
        use_kernels(model, FUSED)
        if recompute:
            apply_recompute(model, RecomputeConfig(recompute_granularity=granularity))
        loss = token_losses(model, tokens, tokens, cu_seqlens=boundaries).sum()
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_generation_and_evaluation_leave_the_logits_alone():
    config = ModelConfig(**SIZES, **LLAMA)
    model = GPT(config)
    initialize(model, config, 1)
    use_kernels(model, FUSED)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        first, second = token_losses(model, tokens, tokens), token_losses(model, tokens, tokens)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(LLAMA, torch.bfloat16, id="llama in bfloat16"),
        pytest.param(GPT2, torch.float32, id="gpt2", marks=pytest.mark.long),
    ],
)
def test_the_fused_model_compiles_without_graph_breaks(options, dtype):
    config = ModelConfig(**SIZES, **options)
    model = GPT(config)
    initialize(model, config, 1)
    use_kernels(model, FUSED)
    model.to(dtype)
    tokens = torch.arange(24)[None]
    torch._dynamo.reset()
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        losses = token_losses(call, tokens, tokens.roll(-1, 1))
        found.append((losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_dropout_of_the_fused_model_follows_from_its_seed():
    config = ModelConfig(**SIZES, **GPT2, hidden_dropout=0.3)
    model = GPT(config)
    initialize(model, config, 1)
    use_kernels(model, FUSED)
    tokens = torch.arange(24)[None]
    losses = [token_losses(model, tokens, tokens, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    model.eval()
    torch.testing.assert_close(token_losses(model, tokens, tokens), token_losses(model, tokens, tokens, seed=1))


def test_the_loss_takes_a_quarter_of_the_eager_memory():
    labels = torch.arange(256)
    ways = {
        "eager": lambda x, w: F.cross_entropy((x @ w.t()).float(), labels),
        "over the logits": lambda x, w: fused_cross_entropy(x @ w.t(), labels, in_place=True).mean(),
        "in chunks": lambda x, w: linear_cross_entropy(x, w, labels, chunk=4096, fused=True).mean(),
    }
    peaks, losses = {}, []
    for name, way in ways.items():
        torch.manual_seed(1)
        x, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (256, 65536))
        with TensorMemory() as memory:
            loss = way(x, weight)
            loss.backward()
        peaks[name] = memory.peak_bytes
        losses.append(float(loss.detach()))
    assert peaks["over the logits"] < 0.25 * peaks["eager"]
    assert peaks["in chunks"] < 0.1 * peaks["eager"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
