"""ELECTRA's two networks in one model: each is what it is alone, and what the second reads is drawn from the first."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megalm.checkpoint.hugging_face import export_model
from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.config.model import ModelConfig
from megalm.config.rules.completion import complete_model
from megalm.data.batch import Batch
from megalm.data.samples.sample import PAD, Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.models.blocks.head import use_linear_loss
from megalm.models.blocks.sampling import TokenSampler
from megalm.models.contract import LanguageModel
from megalm.models.families import FAMILIES
from megalm.objectives import build_objective

FLAGS = (
    "--num-layers 2 --hidden-size 24 --num-attention-heads 4 --ffn-hidden-size 40 --embedding-size 20 --vocab-size 61 "
    "--seq-length 16 --micro-batch-size 4 --train-iters 1 --lr 0.1 --mock-data --make-vocab-size-divisible-by 8 "
    "--model-family electra --objective rtd --rtd-generator-size 0.5 --mask-prob 0.4 --init-method-std 0.3 "
)
VOCAB = 61
STEPS = 600


class Tokenizer:
    def special(self, name: str) -> int | None:
        return {"eod": 0, "mask": 1, "cls": 2, "sep": 3}.get(name)


def built(flags: str = "", *, is_drawn: bool = True) -> LanguageModel:
    config = load_config((FLAGS + flags).split())
    return filled(complete_model(config, None)) if is_drawn else FAMILIES["electra"].build(complete_model(config, None))


def filled(config: ModelConfig) -> LanguageModel:
    family = FAMILIES[config.model_family]
    model = family.build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(family.initial_value(name, tuple(parameter.shape), config, 1))
    return model


def batch_of(numbers: list[int], flags: str = "", padding: int = 3) -> Batch:
    objective = build_objective(load_config((FLAGS + flags).split()), Tokenizer())  # type: ignore[arg-type]
    rows = []
    for number in numbers:
        tokens = np.random.default_rng(number).integers(4, VOCAB, objective.sample_tokens(16))
        tokens[len(tokens) - padding * (number % 2) :] = PAD
        rows.append(objective(Sample(number, 0, tokens)))
    return Batch(tensors={name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})


def part(model: LanguageModel, architecture: str | None) -> LanguageModel:
    """One of the networks as a model of its own, with the weights that a conversion gives it."""
    found = FAMILIES["electra"].part(model.config, architecture)
    alone, whole = FAMILIES[found.config.model_family].build(found.config), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            parameter.copy_(whole[found.name_in_whole(name)])
    return alone


def test_a_loss_without_all_logits_draws_and_learns_the_same() -> None:
    batch, found = batch_of([0, 1, 2, 3]), []
    for linear in (False, True):
        model = built()
        if linear:
            use_linear_loss(model)
        read, losses = read_of(model, batch), model(batch)
        sum(weight * losses[name].sum() for name, weight in model.loss_weights.items()).backward()
        found.append((read, losses["generator"], {name: p.grad for name, p in model.named_parameters()}))
    (read, loss, gradients), (linear_read, linear_loss, linear_gradients) = found
    assert torch.equal(linear_read, read)
    torch.testing.assert_close(linear_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(linear_gradients, gradients, rtol=1e-4, atol=1e-5)


def read_of(model: Any, batch: Batch) -> Tensor:
    """The tokens that the discriminator reads."""
    read: Tensor = model.run_layers(model.embed(batch), batch)[2]
    return read


@pytest.mark.parametrize(
    "flags", ["", "--untie-embeddings-and-output-weights --rtd-generator-size 1 --norm-order pre --num-tokentypes 0 "]
)
def test_both_networks_are_what_they_are_alone(flags: str) -> None:
    """The losses and the gradients of the shared embeddings are those of the two models on their own."""
    model, batch = built(flags), batch_of([0, 1, 2, 3])
    generator, discriminator = part(model, "ElectraForMaskedLM"), part(model, None)
    losses = model(batch)
    texts = {"labels", "loss_mask", "cu_seqlens", "padding_mask"}
    shown = {name: batch[name] for name in texts}
    read = read_of(model, batch)
    alone = {
        "generator": generator(Batch(tensors={**shown, "tokens": batch["tokens"]}))["lm"],
        **discriminator(Batch(tensors={**shown, "tokens": read})),
    }
    assert losses.keys() == alone.keys() == model.loss_weights.keys()
    for name, values in losses.items():
        torch.testing.assert_close(values, alone[name])
    scores = discriminator(Batch(tensors={**shown, "tokens": read}), wants_logits=True)[..., 0]
    real, is_replaced = batch["padding_mask"], read != batch["labels"]
    expected = F.binary_cross_entropy_with_logits(scores[real], is_replaced[real].float(), reduction="sum")
    torch.testing.assert_close(losses["discriminator"].sum(), expected)
    assert losses["discriminator_error"].sum() == ((scores > 0) != is_replaced)[real].sum()
    assert model.counts(batch)["discriminator"].sum() == real.sum() < real.numel()
    (losses["generator"].sum() + 50 * losses["discriminator"].sum()).backward()
    (alone["generator"].sum() + 50 * alone["discriminator"].sum()).backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = FAMILIES["electra"].part
    sums: dict[str, Tensor] = {}
    for architecture, network in (("ElectraForMaskedLM", generator), (None, discriminator)):
        name_in_whole = found(model.config, architecture).name_in_whole
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            sums[name_in_whole(name)] = sums.get(name_in_whole(name), torch.zeros(1)) + parameter.grad
    assert sums.keys() == own.keys(), "every parameter belongs to one of them or to both"
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, sums[name], msg=name)


def test_only_hidden_tokens_are_replaced_and_the_draw_is_the_samples_own() -> None:
    model, numbers = built(), [0, 1, 2, 3]
    batch = batch_of(numbers)
    read, labels, hidden = read_of(model, batch), batch["labels"], batch["loss_mask"] > 0
    assert (batch["tokens"][hidden] == 1).all(), "all hidden tokens are the mask"
    assert (read[~hidden] == labels[~hidden]).all()
    assert 0 < (read != labels)[hidden].float().mean() < 1, "a token that is drawn as it was is the text's"
    assert (read < VOCAB).all()
    one_by_one = torch.cat([read_of(model, batch_of([number])) for number in reversed(numbers)])
    assert torch.equal(one_by_one.flip(0), read), "in any micro-batch and any order"
    assert not torch.equal(read_of(model, batch_of([4, 5, 6, 7]))[hidden], read[hidden])
    again = Batch(tensors={**batch.tensors, "draw_seed": batch["draw_seed"] + 1})
    assert not torch.equal(read_of(model, again), read)


def test_without_labels_the_discriminator_judges_the_tokens_as_they_are() -> None:
    model, batch = built(), batch_of([0])
    tokens = Batch(tensors={"tokens": batch["labels"]})
    assert torch.equal(model(tokens, wants_logits=True), part(model, None)(tokens, wants_logits=True))


def test_draws_follow_the_distribution_and_no_split_of_the_vocabulary() -> None:
    sampler, count, width = TokenSampler(50), 8_000, 64
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, width, generator=generator).mul(1.5).expand(count, width)
    seeds = torch.randint(2**62, (count,), generator=generator)
    for seeds_N, places_N in ((seeds, torch.full((count,), 3)), (seeds[:1].expand(count), torch.arange(count))):
        ids = sampler(logits, seeds_N, places_N)
        probabilities, shares = logits[0, :50].softmax(0), torch.bincount(ids, minlength=width) / count
        assert shares[50:].sum() == 0, "the padding of the vocabulary is never drawn"
        assert ((shares[:50] - probabilities) ** 2 / probabilities).sum() * count < 100, "chi-squared of 49, p < 1e-4"
        halves = [
            sampler.largest(logits[:, first : first + 32], seeds_N, places_N, first) for first in range(0, width, 32)
        ]
        values = torch.stack([value for value, _ in halves])
        assert torch.equal(torch.stack([found for _, found in halves]).gather(0, values.argmax(0)[None])[0], ids)


class Reader:
    """What an export sees of a checkpoint."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self.folder, self.model_config, self.manifest = folder / "step_1", model.config, SimpleNamespace(states={})
        self.manifest.config = {}
        self._parameters = dict(model.named_parameters())

    def read_tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        parameter = self._parameters[name].detach().to(dtype)
        return parameter[:VOCAB] if parameter.shape[0] == 64 else parameter  # without vocabulary padding


@pytest.mark.parametrize(
    ("asked", "name"), [(None, "ElectraForPreTraining"), ("ElectraForMaskedLM", "ElectraForMaskedLM")]
)
def test_a_run_becomes_the_discriminator_or_where_asked_the_generator(
    asked: str | None, name: str, tmp_path: Path
) -> None:
    """transformers' model of the folder that is written gives the logits of that network."""
    model = built()
    assert export_model(Reader(model, tmp_path), tmp_path / "hf", architecture=asked) == name  # type: ignore[arg-type]
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = batch_of([0, 2])["labels"]
    ours = part(model, asked)(Batch(tensors={"tokens": tokens}), wants_logits=True)
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours[..., :VOCAB].reshape(expected.shape), expected)
    assert not (tmp_path / "hf" / "generation_config.json").exists()


TEXT = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --vocab-size 277"
BYTES = TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=20)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_on_text_the_discriminator_beats_the_constant_guess() -> None:
    """Of Python's own text: its loss falls below the entropy of the share of replaced tokens (0.363 and 0.374), which
    no guess does that does not look at them.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer(BYTES)
    run = FLAGS + TEXT + " --rtd-loss-weight 10 --mask-prob 0.15 --init-method-std 0.02"
    config = load_config([*run.split(), "--ffn-hidden-size", "256", "--embedding-size", "64"])
    model, objective = filled(complete_model(config, None)).train(), build_objective(config, tokenizer)
    text = np.asarray(tokenizer.encode(Path(argparse.__file__).read_text(encoding="utf-8")))
    length, generator = objective.sample_tokens(64), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    last: list[tuple[float, float]] = []
    for step in range(STEPS):
        starts = generator.integers(0, len(text) - length, 32)
        rows = [objective(Sample(step * 32 + n, 0, text[start : start + length])) for n, start in enumerate(starts)]
        batch = Batch(tensors={name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})
        losses, counts = model(batch), model.counts(batch)
        means = {name: losses[name].sum() / counts[name].sum() for name in losses}
        optimizer.zero_grad()
        sum(weight * means[name] for name, weight in model.loss_weights.items()).backward()  # type: ignore[union-attr]
        optimizer.step()
        if step >= STEPS - 50:
            replaced = float((read_of(model.eval(), batch) != batch["labels"]).float().mean())
            last.append((replaced, means["discriminator"].item()))
            model.train()
    share, loss = np.mean(last, axis=0)
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert loss < 0.98 * entropy, (loss, entropy)


def test_its_parameters_are_counted_and_its_generator_is_as_small_as_asked() -> None:
    model = built(is_drawn=False)
    family = FAMILIES["electra"]
    assert family.num_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())
    costs = family.part_costs(model.config, 16, "parameters")
    assert costs.embedding + costs.head + sum(costs.layers) == family.num_parameters(model.config)
    flops = family.part_costs(model.config, 16, "flops")
    assert 3 * (flops.head + sum(flops.layers)) == family.training_flops_per_token(model.config, 16)
    first, last = model.layers["0"], model.layers["3"]
    assert isinstance(first, nn.Module)
    assert [first.mlp.w_up.weight.shape, last.mlp.w_up.weight.shape] == [(20, 12), (40, 24)]  # type: ignore[union-attr]
