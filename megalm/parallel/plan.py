"""The table that says which layer of the one-device model gets which parallel form, and its application.

    with torch.device("meta"):
        model = GPT(config, config.padded_vocab_size(place.size))
    shards = parallelize(model, place)
    materialize(model, shards, seed, device)

The model is cut while it is on the meta device, and its values are drawn one parameter at a time, so no rank ever holds
the whole.
"""

import re

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.config.model import ModelConfig
from megalm.dist.functional import all_reduce
from megalm.models.gpt import GPT
from megalm.models.init import initial_value
from megalm.parallel import styles
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import Shards, Style

Plan = tuple[tuple[str, Style], ...]

GPT_PLAN: Plan = (
    (r"embedding\.tokens", styles.vocabulary),
    (r"embedding\.positions", styles.positions),
    (r"embedding\.dropout", styles.dropout),
    (r"layers\.\d+\.(attention|mlp)_norm", styles.replicated),
    (r"layers\.\d+\.(attention|mlp)", styles.entrance),
    (r"layers\.\d+\.attention\.wq", styles.column),
    (r"layers\.\d+\.attention\.w[kv]", styles.kv_column),
    (r"layers\.\d+\.attention\.[qk]_norm", styles.head_norm),
    (r"layers\.\d+\.attention\.core", styles.attention_core),
    (r"layers\.\d+\.attention\.wo", styles.row),
    (r"layers\.\d+\.mlp\.w_(gate|up)", styles.column),
    (r"layers\.\d+\.mlp\.w_down", styles.row),
    (r"layers\.\d+\.dropout", styles.dropout),
    (r"final_norm", styles.replicated),
    (r"head", styles.head),
    (r"token_loss", styles.token_loss),
    (r"full_logits", styles.logits),
)
"""Patterns match a module's whole name. Each matches something, and no two the same module."""

_NOT_IN_EVERY_MODEL = {r"embedding\.positions"}


def parallelize(model: GPT, place: TensorParallel, plan: Plan = GPT_PLAN) -> Shards:
    """Give every layer of `model`, which is on the meta device, its parallel form, in place; what the rank then holds.

    `model` may be a pipeline stage. A group of one rank goes the same way.
    """
    check_plan(model.config, plan)
    shards = Shards(place, model.config)
    expected = {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            for pattern, style in plan:
                if re.fullmatch(pattern, name):
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, style(module, name, shards))
    left = expected ^ set(shards.placements)
    assert not left, f"the plan places every parameter of the model and no other, not {sorted(left)}"
    return shards


def check_plan(config: ModelConfig, plan: Plan = GPT_PLAN) -> None:
    """Assert that every pattern matches a module of the model, and no module two of them."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(config.model_copy(update={"num_layers": 1})).named_modules()]
    for pattern, _ in plan:
        found = any(re.fullmatch(pattern, name) for name in names)
        assert found or pattern in _NOT_IN_EVERY_MODEL, f"pattern {pattern} of the plan matches no module"
    for name in names:
        patterns = [pattern for pattern, _ in plan if re.fullmatch(pattern, name)]
        assert len(patterns) <= 1, f"module {name} matches several patterns of the plan: {patterns}"


@torch.no_grad()
def materialize(model: nn.Module, shards: Shards, seed: int, device: torch.device) -> None:
    """Give a model on the meta device memory on `device` and its initial values, which do not depend on the layout.

    Each parameter is drawn whole, by name, and cut.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        placement = shards.placements[name]
        whole = initial_value(name, placement.shape, shards.config, seed)
        parameter.copy_(placement.cut(whole, tuple(parameter.shape)))
        if name in shards.gradient_groups:
            add_hook = parameter.register_hook
            add_hook(SumGradient(shards.gradient_groups[name]))  # type: ignore[no-untyped-call]


class SumGradient:
    """A parameter's hook: its gradient is the sum of those of all ranks that hold it, taken in float32.

    The hook runs before the gradient is accumulated, and so before any ZeRO stage takes it away.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        """The sum, in the dtype of `gradient`."""
        return all_reduce(gradient.float(), self.group).to(gradient.dtype)
