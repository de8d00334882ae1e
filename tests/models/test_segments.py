"""Segment recurrence against the paper's formulas, one pass over the whole text, and generation.

transformers had this model (TransfoXL) and has removed it, so the reference is written out here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalm.config.recompute import RecomputeConfig
from megalm.models.blocks.segments import SegmentMemory
from megalm.models.generation import generate
from megalm.models.gpt.flops import forward_flops_per_token, num_parameters
from megalm.parallel.recompute import apply_recompute
from megalm.testing.batches import batch_of

T, SEGMENTS, VOCAB = 6, 3, 100
STYLES = {
    "relative": ("gpt2", {"position_embedding_type": "relative", "kv_channels": 10}),
    "relative llama": (
        "llama",
        {"position_embedding_type": "relative", "num_query_groups": None, "norm_order": "sandwich"},
    ),
    "rope": ("llama", {}),
    "window": ("llama", {"window_size": (9, 0), "window_attn_skip_freq": 2}),
    "parallel branches": ("neox", {"use_parallel_residual": True}),
}


@pytest.fixture(params=STYLES)
def style(request, config_of):
    """A configuration for a memory of so many positions."""
    name, changes = STYLES[request.param]
    return lambda memory: config_of(name, segment_memory=memory, max_position_embeddings=T, **changes)


@pytest.fixture
def relative(config_of):
    return lambda memory, **more: config_of(
        "gpt2", position_embedding_type="relative", segment_memory=memory, max_position_embeddings=T, **more
    )


def text(rows=2, length=SEGMENTS * T):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def by_segments(model, tokens, memory):
    """The logits of all positions, segment by segment."""
    past = SegmentMemory(memory)
    return torch.cat([model(batch_of(part), past, wants_logits=True) for part in tokens.split(T, dim=1)], dim=1)


def paper(model, config, tokens, memory):
    """Section 3.3 pair by pair, with pre-norms; each layer's memory is a list of hidden states without gradient."""
    H, C, D = config.num_attention_heads, config.head_dim, config.hidden_size
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2) / D)
    kept, logits = [torch.zeros(len(tokens), 0, D) for _ in model.layers], []
    for part in tokens.split(T, dim=1):
        h = model.embedding.tokens(part)
        for number, layer in enumerate(model.layers.values()):
            seen = torch.cat((kept[number], h), 1)
            kept[number] = seen.detach()[:, max(0, seen.shape[1] - memory) :]
            normed, at = layer.attention_norm(seen), layer.attention
            q, k, v = (w(x).unflatten(-1, (H, C)) for w, x in
                       ((at.wq, layer.attention_norm(h)), (at.wk, normed), (at.wv, normed)))  # fmt: skip
            u, w = at.relative.content_bias.view(H, C), at.relative.distance_bias.view(H, C)
            mixed = []
            for i in range(h.shape[1]):
                before = seen.shape[1] - h.shape[1] + i  # the query's place among the keys
                scores = []
                for j in range(before + 1):
                    angles = (before - j) * frequencies
                    r = (at.relative.projection @ torch.cat((angles.sin(), angles.cos()))).view(H, C)
                    scores.append((q[:, i] * k[:, j] + q[:, i] * r + u * k[:, j] + w * r).sum(-1) / C**0.5)
                weights = torch.stack(scores, -1).softmax(-1)
                mixed.append(torch.einsum("bhs,bshc->bhc", weights, v[:, : before + 1]).flatten(1))
            h = h + at.wo(torch.stack(mixed, 1))
            h = h + layer.mlp(layer.mlp_norm(h))
        logits.append(F.linear(model.final_norm(h), model.embedding.tokens.weight))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("memory", [4, T, 10])
def test_logits_and_gradients_are_those_of_the_paper(relative, build, memory):
    config, tokens = relative(memory), text()
    model = build(config)
    gradients = []
    for logits in (by_segments(model, tokens, memory), paper(model, config, tokens, memory)):
        model.zero_grad()
        logits = logits[..., :VOCAB]
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_two_segments_are_one_pass_over_both_where_the_memory_has_the_first(style, build):
    config, tokens = style(T), text()
    model = build(config).eval()
    with torch.no_grad():
        found, whole = by_segments(model, tokens, T), model(batch_of(tokens), wants_logits=True)
    torch.testing.assert_close(found[:, : 2 * T], whole[:, : 2 * T], rtol=1e-4, atol=1e-4)
    assert (found - whole)[:, 2 * T :, :VOCAB].abs().max() > 1e-2, "the third sees no more than the second"


@pytest.mark.parametrize("memory", [4, 2 * T])
def test_generation_with_a_cache_continues_as_segments_do(style, build, memory):
    config, prompt = style(memory), text(1, T + 3)
    model = build(config).eval()
    written = generate(model, prompt[0].tolist(), 2 * T, temperature=0.0)[0]
    whole = torch.cat((prompt, torch.tensor([written])), 1)
    with torch.no_grad():
        likeliest = by_segments(model, whole, memory)[0].argmax(-1)
    assert likeliest[T + 2 : -1].tolist() == written


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_bit_and_leaves_the_same_memory(relative, build, recompute):
    tokens, results = text(), []
    for granularity in (None, recompute):
        model = build(relative(8, hidden_dropout=0.1))
        apply_recompute(model, RecomputeConfig(recompute_granularity=granularity))
        past = SegmentMemory(8)
        for number, part in enumerate(tokens.split(T, dim=1)):
            model(batch_of(part, seed=number), past)["lm"].sum().backward()
        results.append([*past.layers.values(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert [tuple(kept.shape) for kept in past.layers.values()] == [(2, 8, 32)] * 2
    assert not any(kept.requires_grad for kept in past.layers.values())


def test_parameters_and_operations_are_counted(style, build):
    memory = 9
    config = style(memory)
    model, past = build(config).eval(), SegmentMemory(memory)
    assert num_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    past.advance({layer: torch.zeros(1, memory, config.hidden_size) for layer in range(config.num_layers)})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch_of(text(1, T)), past)
    shared = 0  # the projection of distances, once for all rows of a micro-batch
    if config.position_embedding_type == "relative":
        width = config.num_attention_heads * config.head_dim
        shared = config.num_layers * 2 * (memory + T) * config.hidden_size * width
    found = (counter.get_total_flops() - shared) / T
    assert found == pytest.approx(forward_flops_per_token(config, T, causal=False), abs=config.num_layers + 1)
