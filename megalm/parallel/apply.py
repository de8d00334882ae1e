"""Giving the layers of a one-device model their parallel forms, as the sharding plan of its family says.

    with torch.device("meta"):
        model = GPT(config, config.padded_vocab_size(tp.size))
    shards = parallelize(model, tp)
    materialize(model, shards, seed, device)

The model is cut while it is on the meta device, and its values are drawn one parameter at a time, so no rank ever holds
the whole.
"""

import re

import torch

from megalm.config.model import ModelConfig
from megalm.models.gpt.model import GPT
from megalm.parallel.plans import Plan
from megalm.parallel.plans.gpt import GPT_PLAN, NOT_IN_EVERY_MODEL
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import Shards


def parallelize(model: GPT, tp: TensorParallel, plan: Plan = GPT_PLAN) -> Shards:
    """Give every layer of `model`, which is on the meta device, its parallel form, in place; what the rank then holds.

    `model` may be a pipeline stage. A group of one rank goes the same way.
    """
    check_plan(model.config, plan)
    shards = Shards(tp, model.config)
    expected = {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            for pattern, style in plan:
                if re.fullmatch(pattern, name):
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, style(module, name, shards))
    left = expected ^ set(shards.shard_specs)
    assert not left, f"the plan places every parameter of the model and no other, not {sorted(left)}"
    return shards


def check_plan(config: ModelConfig, plan: Plan = GPT_PLAN) -> None:
    """Assert that every pattern matches a module of the model, and no module two of them."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(config.model_copy(update={"num_layers": 1})).named_modules()]
    for pattern, _ in plan:
        found = any(re.fullmatch(pattern, name) for name in names)
        assert found or pattern in NOT_IN_EVERY_MODEL, f"pattern {pattern} of the plan matches no module"
    for name in names:
        patterns = [pattern for pattern, _ in plan if re.fullmatch(pattern, name)]
        assert len(patterns) <= 1, f"module {name} matches several patterns of the plan: {patterns}"
