"""The decoder-only model: shapes, causality, padding, precision, stages, compilation."""

import pytest
import torch

from megalm.models.blocks.attention import KVCache
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT
from megalm.testing.batches import batch_of, logits, token_losses

COMMON = ["embedding.tokens.weight", "layers.1.attention.wq.weight", "layers.1.attention.wo.weight"]
COMMON += ["layers.0.attention_norm.weight", "layers.0.mlp_norm.weight", "layers.0.mlp.w_up.weight"]
COMMON += ["layers.0.mlp.w_down.weight", "final_norm.weight"]


def tokens_of(config, batch=2, length=11):
    return torch.randint(0, config.vocab_size, (batch, length))


def test_parameter_names_are_the_documented_ones(config_of):
    tied = dict(GPT(config_of("gpt2")).named_parameters())
    assert {*COMMON, "embedding.positions.weight", "layers.0.attention.wk.bias"} <= set(tied)
    assert "head.weight" not in tied
    assert "head.weight" not in GPT(config_of("gpt2")).state_dict()
    untied = dict(GPT(config_of("llama")).named_parameters())
    assert {*COMMON, "head.weight", "layers.0.mlp.w_gate.weight"} <= set(untied)
    assert not any(name.endswith("bias") or "positions" in name for name in untied)


def test_losses_are_the_cross_entropy_of_the_logits(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    labels = tokens_of(style_config)
    losses = token_losses(model, tokens, labels)
    assert losses.shape == (2, 11)
    assert losses.dtype == torch.float32
    expected = -logits(model, tokens).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(losses, expected)


def test_a_token_influences_no_earlier_position(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % style_config.vocab_size
    before, after = logits(model, tokens)[..., :100], logits(model, changed)[..., :100]
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert ((before - after)[:, 6:].abs().amax(-1) > 1e-4).all()


def test_padded_columns_get_no_probability_and_no_gradient(style_config, build):
    model, tokens = build(style_config, padded_vocab_size=128), tokens_of(style_config)
    head = model.embedding.tokens if style_config.tied else model.head
    with torch.no_grad():
        head.weight[100:] = 5.0  # as if something had moved them
    assert (logits(model, tokens).softmax(-1)[..., 100:] == 0).all()
    assert torch.equal(logits(model, tokens)[..., :100], logits(build(style_config, padded_vocab_size=100), tokens))
    for run in (
        lambda: token_losses(model, tokens, tokens).sum(),
        lambda: logits(model, tokens).softmax(-1)[..., 3].sum(),
    ):
        model.zero_grad()
        run().backward()
        assert (head.weight.grad[100:] == 0).all()
        assert head.weight.grad.isfinite().all()


def test_every_parameter_gets_a_gradient(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    token_losses(model, tokens, tokens.roll(-1, 1)).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Softmax does not see what is added to every key, so without positions on the keys this gradient is zero.
    assert {name for name in without if not name.endswith("wk.bias")} == set()


def test_position_ids_default_to_counting_from_zero(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    ids = torch.arange(11).expand(2, 11)
    torch.testing.assert_close(logits(model, tokens, position_ids=ids), logits(model, tokens))


def test_position_ids_reset_within_a_sequence(config_of, build):
    for style in ("gpt2", "llama"):
        model = build(config_of(style))
        tokens = tokens_of(model.config)
        ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]).expand(2, 11)
        assert not torch.allclose(
            logits(model, tokens, position_ids=ids)[:, 4:, :100], logits(model, tokens)[:, 4:, :100]
        )


def test_cached_pieces_equal_one_pass(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    cache = KVCache(capacity=11)
    places = torch.arange(11)[None].split([4, 1, 1, 5], dim=1)
    parts = zip(tokens.split([4, 1, 1, 5], dim=1), places, strict=True)
    pieces = [logits(model, part, cache, position_ids=place) for part, place in parts]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, tokens), rtol=1e-4, atol=1e-5)


def test_meta_model_becomes_the_same_as_a_model_built_on_cpu(style_config):
    with torch.device("meta"):
        model = GPT(style_config)
    model.to_empty(device="cpu")
    initialize(model, style_config, seed=3)
    expected = GPT(style_config)
    initialize(expected, style_config, seed=3)
    tokens = tokens_of(style_config)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_bfloat16_weights_give_float32_losses_close_to_float32_weights(style_config, build):
    model, tokens = build(style_config), tokens_of(style_config)
    exact = token_losses(model, tokens, tokens)
    losses = token_losses(model.bfloat16(), tokens, tokens)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0.25)
    assert logits(model, tokens).dtype == torch.bfloat16


def test_stages_joined_equal_the_whole_model(style_config, build):
    whole, tokens = build(style_config), tokens_of(style_config)
    first = build(style_config, layers=[0], has_head=False)
    last = build(style_config, layers=[1], has_embedding=False)
    batch = batch_of(tokens)
    stream = last.run_layers(first.run_layers(first.embed(batch), batch), batch)
    assert torch.equal(last.losses(stream, batch)["lm"], token_losses(whole, tokens, tokens))
    names = {name for stage in (first, last) for name, _ in stage.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}
    assert ("embedding.tokens.weight" in dict(last.named_parameters())) == style_config.tied
    assert "embedding.positions.weight" not in dict(last.named_parameters())


def test_layernorm_1p_starts_as_the_plain_norm(config_of, build):
    plain, offset = (build(config_of("gpt2", apply_layernorm_1p=value)) for value in (False, True))
    assert (offset.final_norm.weight == 0).all()
    tokens = tokens_of(plain.config)
    torch.testing.assert_close(logits(plain, tokens), logits(offset, tokens))


def test_dropout_acts_in_training_only(config_of, build):
    for changes in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        model = build(config_of("gpt2", **changes))
        tokens = tokens_of(model.config)
        assert not torch.equal(logits(model, tokens), logits(model, tokens))
        model.eval()
        assert torch.equal(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    "style", ["llama", *(pytest.param(style, marks=pytest.mark.long) for style in ("gpt2", "qwen"))]
)
def test_training_forward_compiles_without_graph_breaks(config_of, build, style):
    model = build(config_of(style))
    tokens = tokens_of(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = token_losses(model, tokens, tokens)
    losses = token_losses(compiled, tokens, tokens)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), model.embedding.tokens.weight)
    (exact,) = torch.autograd.grad(expected.sum(), model.embedding.tokens.weight)
    torch.testing.assert_close(gradient, exact)
