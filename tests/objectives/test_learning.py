"""Tiny models learn real text by each objective: their losses fall below what no model without attention can reach.

Without attention a position knows the token that it reads and no other; multi-token prediction knows the next ones as
well. Of all such models the best has as its loss the entropy of what is to be said given that, here the empirical one
of all samples of the run (to which it would be fitted exactly).
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.config.rules.completion import complete_model
from megalm.data.batch import Batch
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.models.families import FAMILIES
from megalm.objectives import build_objective

LENGTH, ROWS, LAST = 64, 32, 20
RUN = (
    f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256 --seq-length {LENGTH} "
    "--vocab-size 377 --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data --tokenizer-type ByteLevelTokenizer "
    "--vocab-extra-ids 120 "
)
ROPE = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
T5 = "--model-family t5 --position-embedding-type relative --normalization RMSNorm --disable-bias-linear --geglu "
ROBERTA = "--model-family bert --objective masked --bert-no-binary-head --position-embedding-type rope "
DENOISERS = "--ul2-denoisers R:0.15:3,S:0.25,X:0.5:3 "
RECIPES = {
    "prefix": (f"{ROPE} --objective prefix", 600),
    "fim": (f"{ROPE} --objective fim --fim-rate 0.5", 600),
    "mtp": (f"{ROPE} --mtp-num-layers 1", 2000),
    "ul2 of decoders": (f"{ROPE} --objective ul2 {DENOISERS}", 600),
    "ul2": (f"{T5} --objective ul2 {DENOISERS}", 1000),
    "roberta": (f"{ROBERTA} --mask-prob 0.15 --reset-attention-mask", 1500),
}


def known(batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a position knows without attention (B, T, K): the token that it reads; of mtp_1 the next one too."""
    tokens = batch.get("decoder_tokens", batch["tokens"])
    if name == "lm":
        return tokens[..., None]
    return torch.stack((tokens, batch["labels"]), -1)


def learned(flags: str, steps: int) -> dict[str, tuple[float, float]]:
    """Each loss over the last steps, and the entropy of its labels given what is known without attention."""
    config = load_config((RUN + flags).split())
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=120))
    objective, settings = build_objective(config, tokenizer), complete_model(config, None)
    family, generator = FAMILIES[settings.model_family], np.random.default_rng(0)
    model: Any = family.build(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(family.initial_value(name, tuple(parameter.shape), settings, 1))
    text = np.asarray(tokenizer.encode(Path(argparse.__file__).read_text(encoding="utf-8")))
    length, optimizer = objective.sample_tokens(LENGTH), torch.optim.AdamW(model.parameters(), lr=2e-3)
    pairs: dict[str, Counter[bytes]] = {name: Counter() for name in model.loss_weights}
    contexts: dict[str, Counter[bytes]] = {name: Counter() for name in model.loss_weights}
    last: list[dict[str, float]] = []
    for step in range(steps):
        starts = generator.integers(0, len(text) - length, ROWS)
        rows = [objective(Sample(step * ROWS + n, 0, text[start : start + length])) for n, start in enumerate(starts)]
        tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        batch = Batch(tensors=tensors)
        losses, counts = model(batch), model.counts(batch)
        means = {name: losses[name].sum() / counts[name].sum() for name in losses}
        optimizer.zero_grad()
        sum(weight * means[name] for name, weight in model.loss_weights.items()).backward()
        optimizer.step()
        for name, weights in counts.items():
            depth = 0 if name == "lm" else 1
            labels = torch.nn.functional.pad(tensors["labels"][:, depth:], (0, depth))
            seen, said = known(tensors, name)[weights > 0], labels[weights > 0]
            contexts[name].update(map(bytes, seen.short().numpy()))
            pairs[name].update(map(bytes, torch.cat((seen, said[:, None]), -1).short().numpy()))
        if step >= steps - LAST:
            last.append({name: mean.item() for name, mean in means.items()})
    return {
        name: (float(np.mean([row[name] for row in last])), entropy(pairs[name]) - entropy(contexts[name]))
        for name in model.loss_weights
    }


def entropy(counter: Counter[bytes]) -> float:
    """Of the empirical distribution, nats."""
    shares = np.array(list(counter.values())) / counter.total()
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_losses_fall_below_those_of_any_model_without_attention(name: str) -> None:
    torch.manual_seed(0)
    for loss, (found, bound) in learned(*RECIPES[name]).items():
        assert found < 0.97 * bound, (loss, found, bound)
