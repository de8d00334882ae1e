"""Which layers stand in which pipeline stage. Pure arithmetic on integers.

A stage is a run of consecutive layers; the first also holds the embedding, the last the output head. A rank holds one
stage, or several of them as its chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.gpt.flops import forward_flops_per_token, num_parameters


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """What the parts of a model cost, in any one unit."""

    embedding: int
    layer: int
    head: int

    @classmethod
    def of_model(cls, model: ModelConfig, seq_length: int, method: PartitionMethod) -> "PartCosts":
        """Parameters (with tied weights the head holds its own copy), or FLOPs of one token's forward pass."""
        if method == "parameters":
            count = num_parameters(model)
            head = count.final_norm + (count.tokens if model.tied else count.head)
            return cls(embedding=count.tokens + count.positions, layer=count.layers // model.num_layers, head=head)
        head = 2 * model.hidden_size * model.padded_vocab_size()
        layers = forward_flops_per_token(model, seq_length) - head
        return cls(embedding=0, layer=layers // model.num_layers, head=head)

    def of_stages(self, layers: Sequence[range]) -> list[int]:
        """The cost of each stage."""
        costs = [len(numbers) * self.layer for numbers in layers]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs


def balanced_layers(num_layers: int, num_stages: int, costs: PartCosts) -> list[range]:
    """The layers of each stage, at least one each, so that the costliest stage costs as little as can be.

    Exact, since all layers cost the same: each layer goes to the stage that is cheapest so far, the earlier one of
    equals. That minimizes the sum of squared stage costs as well, so the other stages are even too.
    """
    assert 1 <= num_stages <= num_layers, f"{num_stages} stages need a layer each, {num_layers} layers are there"
    counts = [1] * num_stages
    loads = costs.of_stages(layer_ranges(counts))
    for _ in range(num_layers - num_stages):
        stage = loads.index(min(loads))
        loads[stage] += costs.layer
        counts[stage] += 1
    return layer_ranges(counts)


def layer_ranges(counts: Sequence[int]) -> list[range]:
    """Numbers of layers, stage by stage, as the layers themselves."""
    stops = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
