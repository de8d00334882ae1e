"""Giving the layers of a one-device model their parallel forms, as the sharding plan of its family says.

    with torch.device("meta"):
        model = FAMILIES[config.model_family].build(config, config.padded_vocab_size(tp.size))
    shards = parallelize(model, tp)
    materialize(model, shards, seed, device)

The model is cut while it is on the meta device, and its values are drawn one parameter at a time, so no rank ever holds
the whole.
"""

import re

import torch

from megalm.config.model import ModelConfig
from megalm.models.contract import LanguageModel
from megalm.models.families import FAMILIES
from megalm.parallel.plans import PLANS
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import ShardingPlan, Shards


def parallelize(model: LanguageModel, tp: TensorParallel) -> Shards:
    """Give every layer of `model`, which is on the meta device, its parallel form, in place; what the rank then holds.

    `model` may be a pipeline stage. A group of one rank goes the same way.
    """
    plan = PLANS[model.config.model_family]
    check_plan(model.config, plan)
    shards = Shards(tp, model.config)
    expected = {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            for pattern, style in plan.rules:
                if re.fullmatch(pattern, name):
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, style(module, name, shards))
    left = expected ^ set(shards.shard_specs)
    assert not left, f"the plan places every parameter of the model and no other, not {sorted(left)}"
    return shards


def check_plan(config: ModelConfig, plan: ShardingPlan) -> None:
    """Assert that every pattern matches a module of the model, and no module two of them."""
    with torch.device("meta"):
        model = FAMILIES[config.model_family].build(config.model_copy(update={"num_layers": 1}))
    names = [name for name, _ in model.named_modules()]
    for pattern, _ in plan.rules:
        found = any(re.fullmatch(pattern, name) for name in names)
        assert found or pattern in plan.optional, f"pattern {pattern} of the plan matches no module"
    for name in names:
        patterns = [pattern for pattern, _ in plan.rules if re.fullmatch(pattern, name)]
        assert len(patterns) <= 1, f"module {name} matches several patterns of the plan: {patterns}"
