"""Random models of each of transformers' encoder classes and ours with the same weights: equal, and both ways."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from decoders import check_round_trip
from encoders import CLASSES, LENGTH, VOCAB, random_model
from hypothesis import HealthCheck, Phase, find, given, settings
from safetensors.torch import load_file, save_file

from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.checkpoint.reader import CheckpointReader
from megalm.cli import main
from megalm.config.hugging_face import architecture_of, read_settings, same_model, write_settings
from megalm.data.batch import Batch
from megalm.models.blocks.head import use_linear_loss
from megalm.models.families import FAMILIES

T = 21
BEFORE, AFTER = 4, 3
"""Padding of the first row, and of the second."""


def ours(theirs):
    """Our model with the weights of theirs."""
    name = type(theirs).__name__
    values = theirs.config.to_dict() | {"architectures": [name]}
    architecture, config = read_settings(values, "config.json")
    assert architecture == name
    model = FAMILIES[config.model_family].build(config, VOCAB)
    own, stored = Correspondence.of(config, name), dict(theirs.named_parameters())
    assert own.tensors.keys() == stored.keys()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in own.tensors.values():
            shapes = [own.shapes[part] for part in tensor.ours]
            for number, part in enumerate(tensor.ours):
                index = tuple(slice(0, size) for size in shapes[number])
                read = tensor.layout.read(lambda part, t=tensor: stored[t.name][part], number, shapes, index)
                parameters[part].copy_(read)
    return model.eval(), own


@dataclass
class Texts:
    """Two rows with padding, some tokens hidden, as both sides take them."""

    fields: dict[str, torch.Tensor]
    arguments: dict[str, Any]
    real: torch.Tensor

    @classmethod
    def of(cls, model, theirs, *, has_padding=True, as_texts=False):
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(3, VOCAB, (2, T), generator=generator)  # their embedding gives padding no gradient
        hidden = torch.rand(2, T, generator=generator) < 0.4
        tokens = labels.masked_fill(hidden, 5)
        types = torch.randint(max(1, model.config.num_tokentypes), (2, T), generator=generator)
        real = torch.ones(2, T, dtype=torch.bool)
        if has_padding:
            before = 0 if model.config.has_sentence_head else BEFORE  # which reads the first position
            real[0, :before], real[1, -AFTER:] = False, False
        weights = hidden & real
        positions = torch.arange(T)[None] + 2
        fields = {"tokens": tokens, "labels": labels, "loss_mask": weights.float(), "position_ids": positions}
        if has_padding and not as_texts:
            fields["padding_mask"] = real
        if as_texts:
            fields["cu_seqlens"] = torch.tensor([[0, before] + [T] * (T - 1), [0, T - AFTER] + [T] * (T - 1)])
        arguments = {
            "input_ids": tokens,
            "attention_mask": real.long(),
            "position_ids": positions + model.config.position_embedding_offset,
            "labels": labels.masked_fill(~weights, -100),
        }
        if model.config.num_tokentypes:
            fields["token_types"] = arguments["token_type_ids"] = types
        if model.config.has_sentence_head:
            fields["is_random"] = arguments["next_sentence_label"] = torch.tensor([1, 0])
        if model.config.model_family == "electra":  # the discriminator: which tokens are not the text's, padding apart
            arguments["labels"], fields["padding_mask"] = (tokens != labels).long(), real
        return cls(fields, arguments, real)


def losses(model, texts):
    """The loss that is trained on: named losses by their weights, each over its own denominator."""
    batch = Batch(tensors=texts.fields)
    found, counts = model(batch), model.counts(batch)
    return sum(weight * found[name].sum() / counts[name].sum() for name, weight in model.loss_weights.items())


def closeness(found, expected):
    return float((found - expected).detach().abs().max() / expected.abs().max().clamp_min(1e-6))


def logits_of(theirs, texts):
    output = theirs(**texts.arguments)
    logits = output.logits if "logits" in output else output.prediction_logits
    return logits[..., None] if type(theirs).__name__ == "ElectraForPreTraining" else logits


def check(name, config):
    theirs = random_model(name, config)
    check_round_trip(theirs)
    model, own = ours(theirs)
    for options in ({"has_padding": False}, {}, {"as_texts": True}):
        texts = Texts.of(model, theirs, **options)
        found, expected = model(Batch(tensors=texts.fields), wants_logits=True), logits_of(theirs, texts)
        assert closeness(found[texts.real], expected[texts.real]) < 1e-5, options
    loss, expected = losses(model, texts), theirs(**texts.arguments).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    loss.backward()
    check_gradients(model, theirs, own)
    model.zero_grad()
    use_linear_loss(model)
    loss = losses(model, texts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    check_gradients(model, theirs, own)
    check_steps(model, theirs, Texts.of(model, theirs))
    check_settings(model.config, name)


def check_gradients(model, theirs, own):
    parameters, stored = dict(model.named_parameters()), dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in stored.values())
    for name, tensor in own.tensors.items():
        assert torch.equal(tensor.layout.join([parameters[part].data for part in tensor.ours]), stored[name])
        joined = tensor.layout.join([parameters[part].grad for part in tensor.ours])
        # some are rounding errors of zero: biases of keys cancel in softmax
        bound = max(1e-4 * float(stored[name].grad.abs().max()), 1e-6 * largest)
        assert float((joined - stored[name].grad).abs().max()) < bound, name


def check_steps(model, theirs, texts, steps=5, tolerance=1e-5):
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-4) for one in (model, theirs)]
    for _ in range(steps):
        pair = [losses(model, texts), theirs(**texts.arguments).loss]
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert pair[0].item() == pytest.approx(pair[1].item(), rel=tolerance)


@pytest.mark.long
def test_a_bert_trains_20_steps_as_transformers_does():
    """Masked tokens and sentences, with padding."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes)
    theirs = random_model("BertForPreTraining", config)
    model, _ = ours(theirs)
    check_steps(model, theirs, Texts.of(model, theirs), steps=20, tolerance=1e-4)


def check_settings(config, name):
    """config.json and back is the same model, whether or not its class is told."""
    for architecture in (name, architecture_of(config)):
        again = read_settings(json.loads(json.dumps(write_settings(architecture, config))), "config.json")
        assert again[0] == architecture
        assert same_model(config, again[1]) == []


# without shrinking, which takes minutes here
ANY = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
FEW = settings(ANY, max_examples=2, derandomize=True)
MANY = settings(ANY, max_examples=25)


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_equal(name):
    FEW(given(config=CLASSES[name]())(lambda config: check(name, config)))()


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_many_models_are_equal(name):
    MANY(given(config=CLASSES[name]())(lambda config: check(name, config)))()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n.startswith("Electra") else []) for n in CLASSES]
)
def test_there_and_back_gives_the_same_bytes(name, tmp_path, capsys):
    """Through a run folder, and compared with transformers on the way; files as they were published, too."""
    there, run, back = tmp_path / "there", tmp_path / "run", tmp_path / "back"
    random_model(name, find(CLASSES[name](), lambda config: True)).save_pretrained(there)
    before = load_file(there / "model.safetensors")
    if name == "BertForMaskedLM":
        old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for key, tensor in before.items()}  # fmt: skip
        copy = before["cls.predictions.bias"].clone()
        head = {"cls.seq_relationship.weight": torch.zeros(2, 12), "cls.predictions.decoder.bias": copy}
        save_file(old | head, there / "model.safetensors", {"format": "pt"})
    assert main(["convert", "from-hf", str(there), "--save", str(run)]) == 0
    assert main(["convert", "to-hf", str(run), str(back)]) == 0
    said = capsys.readouterr().out.splitlines()
    differences = [float(line.split(": ")[1].split()[0]) for line in said if line.startswith("largest difference")]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (back / "generation_config.json").exists()
    assert CheckpointReader(run / "step_0").model_config.is_encoder
    assert main(["generate", "--load", f"hf:{back}", "--prompt", "a"]) != 0
