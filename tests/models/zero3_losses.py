"""For the rank of test_zero3.py: losses under DeepSpeed ZeRO-3 and of plain torch."""

import deepspeed
import torch

from megalm.config.model import ModelConfig
from megalm.engine import deepspeed_patches
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT
from megalm.testing.batches import token_losses

ZERO3 = {
    "train_batch_size": 2,
    "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 where nothing is said
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 200, (2, 17), generator=generator) for _ in range(4)]


def build(config: ModelConfig) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(config)
    initialize(model, config, seed=1)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def plain_losses(config: ModelConfig) -> list[float]:
    model, optimizer = build(config)
    losses = []
    for tokens in batches():
        loss = token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zero3_losses(config: ModelConfig) -> list[float]:
    model, optimizer = build(config)
    deepspeed_patches.without_shared_memory_collectives()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)
    losses = []
    for tokens in batches():
        loss = token_losses(engine, tokens[:, :-1], tokens[:, 1:]).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    sharded = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    assert len(sharded) == len(list(model.parameters())), "a parameter was left gathered after the step"
    return losses


def plain_and_zero3(tied: bool) -> tuple[list[float], list[float]]:
    """The losses of plain torch, and of ZeRO-3."""
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=200,
        max_position_embeddings=16,
        untie_embeddings_and_output_weights=not tied,
    )
    return plain_losses(config), zero3_losses(config)
