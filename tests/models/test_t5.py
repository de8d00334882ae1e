"""Random models of transformers' encoder-decoder classes and ours with the same weights: equal, and both ways."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from decoders import check_round_trip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.commands.generate import load_model
from megalm.config.hugging_face import architecture_of, read_settings, same_model, write_settings
from megalm.config.model import ModelConfig
from megalm.models.blocks.attention import KVCache
from megalm.models.families import FAMILIES
from megalm.models.generation import Piece, generate

VOCAB, S, T = 99, 21, 13
CLASSES = {"T5ForConditionalGeneration": transformers.T5Config, "MT5ForConditionalGeneration": transformers.MT5Config}


@st.composite
def models(draw: st.DrawFn, name: str) -> Any:
    """A random model, with a head of its own or without; transformers 5 tells that by the weights alone."""
    config = CLASSES[name](
        vocab_size=VOCAB,
        d_model=draw(st.sampled_from([24, 36])),
        d_kv=draw(st.sampled_from([4, 6, 10])),
        d_ff=draw(st.sampled_from([40, 17])),
        num_heads=draw(st.sampled_from([1, 3, 4])),
        num_layers=draw(st.sampled_from([1, 2])),
        num_decoder_layers=draw(st.sampled_from([None, 3])),
        relative_attention_num_buckets=draw(st.sampled_from([4, 8, 32])),
        relative_attention_max_distance=draw(st.sampled_from([20, 128])),
        feed_forward_proj=draw(st.sampled_from(["relu", "gated-gelu", "gated-silu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-4])),
        tie_word_embeddings=draw(st.booleans()),
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    if draw(st.booleans()):
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, config.d_model))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Padding before one text and after the other."""
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[0, -4:] = mask[1, :3] = False
    return {
        "tokens": torch.randint(3, VOCAB, (2, S)),
        "decoder_tokens": torch.randint(3, VOCAB, (2, T)),
        "padding_mask": mask,
        "labels": torch.randint(3, VOCAB, (2, T)),
        "loss_mask": torch.ones(2, T),
    }


def their_inputs(fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"input_ids": "tokens", "decoder_input_ids": "decoder_tokens"}
    return {name: fields[own] for name, own in names.items()} | {"attention_mask": fields["padding_mask"].long()}


def closeness(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-6)).item())


def loaded(theirs: Any) -> tuple[Any, Correspondence, dict[str, torch.Tensor]]:
    """Our model with the same weights, which tensors are which, and theirs as they are stored."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        reader = HuggingFaceReader(Path(folder))
        stored = load_file(Path(folder) / "model.safetensors")
        model = load_model(reader).eval()
    return model, Correspondence.of(model.config, type(theirs).__name__), stored


@pytest.mark.long
def test_a_t5_trains_20_steps_as_transformers_does() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    model, own, _ = loaded(theirs.eval())
    check_steps(model, theirs, own, batch(), steps=20, tolerance=1e-4)


def check(theirs: Any) -> None:
    check_round_trip(theirs)
    (model, own, stored), name = loaded(theirs), type(theirs).__name__
    parameters = dict(model.named_parameters())
    assert set(own.tensors) == set(stored)
    for tensor in own.tensors.values():
        assert torch.equal(tensor.layout.join([parameters[part].data[:VOCAB] for part in tensor.ours]),
                           stored[tensor.name])  # fmt: skip
    fields = batch()
    found = model(Piece(fields), wants_logits=True)[..., :VOCAB]
    assert closeness(found, theirs(**their_inputs(fields)).logits) < 1e-5
    check_generation(model, theirs, fields["tokens"][:1])
    check_steps(model, theirs, own, fields)
    check_settings(model.config, name)


def check_generation(model: Any, theirs: Any, tokens: torch.Tensor) -> None:
    """Keys and values that are kept give the tokens of transformers, and the logits of a model that keeps none."""
    fits = theirs.config.num_decoder_layers <= theirs.config.num_layers  # their cache has the encoder's layers alone
    expected = theirs.generate(
        tokens, max_new_tokens=6, do_sample=False, num_beams=1, eos_token_id=None, use_cache=fits
    )
    assert generate(model, tokens[0].tolist(), 6, temperature=0.0, start_token=0) == [expected[0, 1:].tolist()]
    whole = model(Piece({"tokens": tokens, "decoder_tokens": expected}), wants_logits=True)
    assert whole[0, :-1].argmax(dim=-1).tolist() == expected[0, 1:].tolist()
    cache = KVCache(7)
    pieces = [Piece({"tokens": tokens, "decoder_tokens": expected[:, :2]})]
    pieces += [Piece.written_after(cache, expected[:, start : start + size]) for start, size in ((2, 1), (3, 4))]
    kept = torch.cat([model(piece, cache, wants_logits=True) for piece in pieces], dim=1)
    assert closeness(kept[..., :VOCAB], whole[..., :VOCAB]) < 1e-5


def check_steps(
    model: Any,
    theirs: Any,
    own: Correspondence,
    fields: dict[str, torch.Tensor],
    steps: int = 5,
    tolerance: float = 1e-5,
) -> None:
    """The gradients of the first step, and the losses of all."""
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-4) for one in (model, theirs)]
    for step in range(steps):
        ours = model(Piece(fields))["lm"].mean()
        logits = theirs(**their_inputs(fields)).logits
        others = F.cross_entropy(logits.flatten(0, 1), fields["labels"].flatten())
        assert ours.item() == pytest.approx(others.item(), rel=tolerance)
        for optimizer, loss in zip(optimizers, (ours, others), strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            check_gradients(model, theirs, own)
        for optimizer in optimizers:
            optimizer.step()


def check_gradients(model: Any, theirs: Any, own: Correspondence) -> None:
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    parameters = dict(model.named_parameters())
    for name, tensor in own.tensors.items():
        joined = tensor.layout.join([parameters[part].grad[:VOCAB] for part in tensor.ours])
        error = float((joined - gradients[name]).abs().max())
        assert error < max(1e-4 * float(gradients[name].abs().max()), 1e-6), name


def check_settings(config: ModelConfig, architecture: str) -> None:
    """config.json and back is the same model, whether or not its class is told."""
    for name in (architecture, architecture_of(config)):
        again = read_settings(json.loads(json.dumps(write_settings(name, config))), "config.json")
        assert again[0] == name
        assert same_model(config, again[1]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_equal(name: str) -> None:
    few = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    few(given(theirs=models(name))(check))()


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_many_models_are_equal(name: str) -> None:
    many = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    many(given(theirs=models(name))(check))()


def test_samples_draw_for_themselves() -> None:
    """What is kept of the prompt, read once, is that of every sample."""
    sizes = {"num_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 50, "relu": True}
    config = ModelConfig.model_validate(sizes | T5_STYLE)
    model = FAMILIES["t5"].build(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(FAMILIES["t5"].initial_value(name, tuple(parameter.shape), config, 1))
    samples = generate(model, [3, 4, 5], 8, num_samples=3, seed=3, start_token=0)
    assert samples[:1] == generate(model, [3, 4, 5], 8, num_samples=1, seed=3, start_token=0)
    assert len({tuple(sample) for sample in samples}) == 3
    stop = samples[1][2]
    ended = generate(model, [3, 4, 5], 8, num_samples=3, seed=3, start_token=0, stop_token=stop)
    assert ended == [sample[: sample.index(stop) + 1] if stop in sample else sample for sample in samples]


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_layers_drop_where_those_of_transformers_do(feed_forward: str, tmp_path: Path) -> None:
    """The same numbers are drawn in the same order: for scores, branches and the channels of the MLP."""
    config = CLASSES["T5ForConditionalGeneration"](
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_heads=4, num_layers=1, feed_forward_proj=feed_forward,
        dropout_rate=0.3, decoder_start_token_id=0,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).train()
    theirs.save_pretrained(tmp_path)
    model = load_model(HuggingFaceReader(tmp_path)).train()
    x, memory = torch.randn(2, S, 24), torch.randn(2, T, 24)
    none, causal = torch.zeros(1, 1, 1, 1), torch.full((1, 1, S, S), -torch.inf).triu(1)
    decoder = theirs.decoder.block[0]
    pairs = {
        "encoder": (lambda: model.layers["0"](x, none), lambda: theirs.encoder.block[0](x, position_bias=none)[0]),
        "decoder": (
            lambda: model.layers["1"](x, memory, causal, None),
            lambda: decoder(x, position_bias=causal, encoder_hidden_states=memory, encoder_decoder_position_bias=none)[
                0
            ],
        ),
    }
    for name, pair in pairs.items():
        found = []
        for layer in pair:
            torch.manual_seed(7)
            with sdpa_kernel(SDPBackend.MATH):
                found.append(layer())
        assert closeness(*found) < 1e-5, name


T5_STYLE = {
    "model_family": "t5",
    "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
}
V1_1 = {"geglu": True, "openai_gelu": True, "untie_embeddings_and_output_weights": True}
PUBLISHED = {
    # google-t5/t5-small, t5-base and t5-11b; google/t5-v1_1-small; google/mt5-small
    60_506_624: {"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 2048, "relu": True},
    222_903_552: {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 3072}
    | {"relu": True},
    11_307_321_344: {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 128, "kv_channels": 128}
    | {"ffn_hidden_size": 65536, "relu": True},
    76_961_152: {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 6, "kv_channels": 64}
    | {"ffn_hidden_size": 1024, **V1_1},
    300_176_768: {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 6, "kv_channels": 64}
    | {"ffn_hidden_size": 1024, "vocab_size": 250112, **V1_1},
}


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_published_sizes(parameters: int) -> None:
    config = ModelConfig.model_validate({"vocab_size": 32128} | T5_STYLE | PUBLISHED[parameters])
    assert FAMILIES["t5"].num_parameters(config) == parameters


@pytest.mark.parametrize("style", [{"relu": True}, V1_1 | {"decoder_num_layers": 3}])
def test_parameters_and_operations_are_those_of_the_model(style: dict[str, Any]) -> None:
    sizes = {"num_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 50, "decoder_seq_length": T}
    config = ModelConfig.model_validate(sizes | T5_STYLE | style)
    family = FAMILIES["t5"]
    model = family.build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == family.num_parameters(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(family.initial_value(name, tuple(parameter.shape), config, 1))
    fields = {name: tensor % 50 if tensor.dtype == torch.long else tensor for name, tensor in batch().items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(Piece(fields))["lm"].sum().backward()
    # the product computes every score of the decoder, the count is of those that its mask leaves
    hidden = 2 * 3 * config.decoder_layers * 4 * 12 * (T * T - T * (T + 1) // 2)
    per_token = family.training_flops_per_token(config, S)
    assert 0 <= counter.get_total_flops() - hidden - 2 * S * per_token < 2 * S


@pytest.mark.parametrize("style", [{"relu": True}, V1_1])
def test_initial_losses_are_near_that_of_a_uniform_guess(style: dict[str, Any]) -> None:
    """Scores without a scale, and a tied head of unit rows, need initial values of their own."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB}
    config = ModelConfig.model_validate(sizes | T5_STYLE | style)
    model = FAMILIES["t5"].build(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(FAMILIES["t5"].initial_value(name, tuple(parameter.shape), config, 1))
    loss = model(Piece(batch()))["lm"].mean().item()
    assert loss < 1.3 * torch.tensor(float(VOCAB)).log().item()
