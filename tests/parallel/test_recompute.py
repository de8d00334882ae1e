"""Recomputation changes memory only: losses, gradients and the random numbers after them are equal to the bit."""

import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.errors import ConfigError
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT
from megalm.parallel.recompute import apply_recompute
from megalm.testing.batches import batch_of, logits, token_losses

LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "num_query_groups": 2,
}
STYLES = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen": LLAMA | {"add_qkv_bias": True, "qk_layernorm": True},
    "gemma": LLAMA
    | {"norm_order": "sandwich", "window_size": (5, 0), "attn_logit_softcapping": 5.0, "geglu": True, "swiglu": False},
    "olmo": LLAMA | {"norm_order": "branch", "qk_layernorm": True, "qk_layernorm_full_width": True},
    "neox": {"use_parallel_residual": True, "relu": True},
    "nemotron": {"squared_relu": True, "apply_layernorm_1p": True, "kv_channels": 6, "position_embedding_type": "none"},
}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
MODES = {
    "full": FULL,
    "uniform 2": FULL | {"recompute_num_layers": 2},
    "block 2": FULL | {"recompute_method": "block", "recompute_num_layers": 2},
    "selective": SELECTIVE,
}
B, T, V = 2, 24, 100


def built(style: str, recompute: dict[str, object], dropout: float = 0.0, **changes: object) -> GPT:
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": V, "ffn_hidden_size": 72}
    more = {"max_position_embeddings": T, "attention_dropout": dropout, "hidden_dropout": dropout}
    config = ModelConfig.model_validate(sizes | more | STYLES[style] | changes)
    model = GPT(config)
    initialize(model, config.model_copy(update={"init_method_std": 0.2}), 1)
    apply_recompute(model, RecomputeConfig.model_validate(recompute))
    return model


def tokens() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))


def trained(model: GPT, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    """Losses, gradients and the next random number of one forward and backward pass."""
    torch.manual_seed(3)
    fields = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    losses = token_losses(model, tokens(), tokens(), **fields)
    losses.sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"losses": losses.detach(), "next": torch.rand(4)}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("style", "dropout", "dtype"), itertools.product(STYLES, (0.0, 0.2), (torch.float32, torch.bfloat16))
)
def test_every_mode_equals_no_recomputation_to_the_bit(style: str, dropout: float, dtype: torch.dtype) -> None:
    plain = trained(built(style, {}, dropout).to(dtype))
    for mode in MODES.values():
        assert_same_bits(trained(built(style, mode, dropout).to(dtype)), plain)


def test_attention_inside_documents_is_recomputed_inside_them() -> None:
    ends = torch.tensor([[0, 5, 17] + [T] * (T - 2), [0, 9] + [T] * (T - 1)])
    plain = trained(built("llama", {}, dropout=0.1), ends)
    assert not torch.equal(plain["losses"], trained(built("llama", {}, dropout=0.1))["losses"])
    for mode in MODES.values():
        assert_same_bits(trained(built("llama", mode, dropout=0.1), ends), plain)


def runs_of(model: GPT, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Callable[[], int]:
    """A counter of the forward passes of all modules of a kind."""
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


@pytest.mark.parametrize(("mode", "again"), [("full", 3), ("uniform 2", 3), ("block 2", 2), ("selective", 0)])
def test_as_many_layers_run_twice_as_asked(mode: str, again: int) -> None:
    model = built("llama", MODES[mode])
    count = runs_of(model, type(model.layers["0"].attention.wq))  # type: ignore[union-attr]
    # all seven products of a layer run again, but for the last of each group: nobody has saved its output
    groups = {"full": 3, "uniform 2": 2, "block 2": 2, "selective": 0}[mode]
    trained(model)
    assert count() == 3 * 7 + 1 + 7 * again - groups


def alive_after_forward(model: GPT) -> int:
    """Bytes that the graph of a forward pass keeps: storages that its nodes have saved, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, tokens(), tokens())
    for tensor in kept:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    del loss
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_selective_recomputation_keeps_no_output_of_norms_core_and_activation(style: str) -> None:
    saved = alive_after_forward(built(style, {})) - alive_after_forward(built(style, SELECTIVE))
    model = built(style, {}).config
    width = 3 * model.hidden_size + model.ffn_size
    assert saved >= model.num_layers * B * T * width * 4


def test_dropped_outputs_come_back_only_when_the_gradient_arrives() -> None:
    model = built("gpt2", SELECTIVE)
    outputs: list[Tensor] = []
    model.layers["1"].attention.core.register_forward_hook(lambda _m, _i, output: outputs.append(output))  # type: ignore[union-attr]
    loss = token_losses(model, tokens(), tokens()).sum()
    assert outputs[0].untyped_storage().nbytes() == 0
    loss.backward()
    assert outputs[0].untyped_storage().nbytes() == B * T * 32 * 4


def test_nothing_outlives_the_backward_pass() -> None:
    model = built("llama", SELECTIVE)
    inputs: list[weakref.ref[Tensor]] = []
    model.layers["1"].attention.core.register_forward_pre_hook(lambda _m, args: inputs.append(weakref.ref(args[0])))  # type: ignore[union-attr]
    loss = token_losses(model, tokens(), tokens()).sum()
    loss.backward()
    del loss
    assert inputs[0]() is None


def test_input_and_weight_gradients_may_be_asked_for_one_after_the_other() -> None:
    """Zero-bubble schedules run the backward pass of a stage twice."""
    for mode in ({}, *MODES.values()):
        model = built("llama", mode, dropout=0.1)
        torch.manual_seed(3)
        x = torch.randn(B, T, 32, requires_grad=True)
        (y,) = model.run_layers((x,), batch_of(tokens()))
        weights = list(model.layers.parameters())
        (of_input,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        of_weights = torch.autograd.grad(y.sum(), weights)
        if not mode:
            expected = [of_input, *of_weights]
        assert all(torch.equal(a, b) for a, b in zip([of_input, *of_weights], expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_generation_and_parameter_names_do_not_change(mode: str) -> None:
    plain, changed = built("llama", {}), built("llama", MODES[mode])
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in changed.named_parameters()]
    with torch.no_grad():
        assert torch.equal(logits(plain, tokens()), logits(changed, tokens()))


def test_a_stage_recomputes_too() -> None:
    model = built("llama", MODES["block 2"])
    stage = GPT(model.config, layers=[1], has_embedding=False, has_head=False)
    initialize(stage, model.config, 1)
    apply_recompute(stage, RecomputeConfig.model_validate(MODES["block 2"]))
    x = torch.randn(B, T, 32, requires_grad=True)
    stage.run_layers((x,), batch_of(tokens()))[0].sum().backward()
    assert x.grad is not None


def test_a_layer_without_the_expected_parts_is_an_error() -> None:
    model = built("gpt2", {})
    model.layers["2"].attention.core = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"no attention\.core in layer 2"):
        apply_recompute(model, RecomputeConfig.model_validate(SELECTIVE))
