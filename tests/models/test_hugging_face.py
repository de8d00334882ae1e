"""Random models of each of transformers' decoder classes and ours with the same weights: equal, and both ways."""

import json

import pytest
import torch
import torch.nn.functional as F
from decoders import CLASSES, VOCAB, check_round_trip, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.config.hugging_face import architecture_of, read_settings, same_model, write_settings
from megalm.models.families import FAMILIES
from megalm.models.generation import Piece, generate

T = 21


def ours(config, theirs):
    """Our model with the weights of theirs."""
    values = config.to_dict() | {"architectures": [type(theirs).__name__]}
    architecture, settings_of_model = read_settings(values, "config.json")
    model = FAMILIES["gpt"].build(settings_of_model, VOCAB)
    own, stored = Correspondence.of(settings_of_model, architecture), stored_tensors(theirs, architecture)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in own.tensors.values():
            shapes = [own.shapes[name] for name in tensor.ours]
            for number, name in enumerate(tensor.ours):
                index = tuple(slice(0, size) for size in shapes[number])
                parameters[name].copy_(
                    tensor.layout.read(lambda part, t=tensor: stored[t.name][part], number, shapes, index)
                )
    return model.eval(), own


def stored_tensors(theirs, architecture, *, gradients=False):
    """Their parameters by the names that files have."""
    head = FAMILIES["gpt"].hugging_face[architecture].head
    named = {name.replace("lm_head", head): parameter for name, parameter in theirs.named_parameters()}
    return {name: parameter.grad if gradients else parameter for name, parameter in named.items()}


def losses_of(model, tokens, is_ours):
    logits = model(Piece({"tokens": tokens}), wants_logits=True) if is_ours else model(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def closeness(found, expected):
    return float((found - expected).detach().abs().max() / expected.abs().max().clamp_min(1e-6))


def check(config):
    theirs = random_model(config)
    check_round_trip(theirs)
    model, own = ours(config, theirs)
    tokens = torch.randint(3, VOCAB, (2, T))  # their embedding gives padding no gradient
    assert closeness(model(Piece({"tokens": tokens}), wants_logits=True), theirs(tokens).logits) < 1e-5
    check_padding(model, theirs, tokens)
    check_generation(model)
    for one, is_ours in ((model, True), (theirs, False)):
        losses_of(one, tokens, is_ours).backward()
    gradients = stored_tensors(theirs, config_class(theirs), gradients=True)
    parameters = dict(model.named_parameters())
    for name, tensor in own.tensors.items():
        joined = tensor.layout.join([parameters[part].grad for part in tensor.ours])
        assert joined.shape == gradients[name].shape
        # some are rounding errors of zero: biases of keys cancel in softmax
        error = float((joined - gradients[name]).abs().max())
        assert error < max(1e-4 * float(gradients[name].abs().max()), 1e-6), name
        assert torch.equal(tensor.layout.join([parameters[part].data for part in tensor.ours]),
                           stored_tensors(theirs, config_class(theirs))[name])  # fmt: skip
    check_steps(model, theirs, tokens)
    check_settings(model.config, config_class(theirs))


def config_class(theirs):
    return type(theirs).__name__


def check_padding(model, theirs, tokens):
    """Padding before and after a text, and positions that do not begin at 0."""
    before, after = 4, 3
    mask = torch.ones_like(tokens)
    mask[0, :before] = 0
    mask[1, -after:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    ends = torch.full((2, T + 1), T)
    ends[:, 0] = 0
    ends[0, 1] = before
    found = model(Piece({"tokens": tokens, "position_ids": positions, "cu_seqlens": ends}), wants_logits=True)
    assert closeness(found[0, before:], expected[0, before:]) < 1e-5
    assert closeness(found[1, :-after], expected[1, :-after]) < 1e-5
    moved = torch.arange(T)[None] + 5
    found = model(Piece({"tokens": tokens, "position_ids": moved}), wants_logits=True)
    assert closeness(found, theirs(tokens, position_ids=moved).logits) < 1e-5


def check_generation(model):
    """The cache gives the tokens that the whole text gives each time."""
    prompt = [5, 17, 33]
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            logits = model(Piece({"tokens": torch.tensor([expected])}), wants_logits=True)
            expected.append(int(logits[0, -1].argmax()))
    assert generate(model, prompt, 12, temperature=0.0) == [expected[3:]]


def check_steps(model, theirs, tokens):
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-4) for one in (model, theirs)]
    for _ in range(5):
        pair = []
        for one, optimizer, is_ours in zip((model, theirs), optimizers, (True, False), strict=True):
            optimizer.zero_grad()
            loss = losses_of(one, tokens, is_ours)
            loss.backward()
            optimizer.step()
            pair.append(loss.item())
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def check_settings(config, architecture):
    """config.json and back is the same model, whether or not its class is told."""
    for name in (architecture, architecture_of(config)):
        again = read_settings(json.loads(json.dumps(write_settings(name, config))), "config.json")
        assert again[0] == name
        assert same_model(config, again[1]) == []


FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_equal(name):
    FEW(given(config=CLASSES[name]())(check))()


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_many_models_are_equal(name):
    MANY(given(config=CLASSES[name]())(check))()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM"])
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_part_of_any_tensor_is_read(folder_of, name, data):
    """Fused and transposed tensors, in boxes that begin and end anywhere."""
    reader = HuggingFaceReader(folder_of(name))
    tensor = data.draw(st.sampled_from(sorted(reader.names)))
    whole = reader.read_tensor(tensor)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    assert torch.equal(reader.read(tensor, start=start, stop=stop), whole.flatten()[start:stop])
