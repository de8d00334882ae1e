"""Which layers stand in which stage: exact on every small case, by comparison with all partitions."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from megalm.config.model import ModelConfig
from megalm.models.contract import PartCosts
from megalm.models.gpt.flops import forward_flops_per_token, num_parameters, part_costs
from megalm.parallel.pipeline.partition import balanced_layers, layer_ranges

COST = st.integers(0, 50)


def all_partitions(layers: int, stages: int) -> list[list[range]]:
    found = []
    for inner in combinations(range(1, layers), stages - 1):
        borders = (0, *inner, layers)
        found.append([range(*pair) for pair in pairwise(borders)])
    return found


@given(st.integers(1, 9), st.data(), COST, COST, COST)
def test_no_partition_has_a_cheaper_costliest_stage(layers, data, embedding, layer, head) -> None:
    stages = data.draw(st.integers(1, layers))
    costs = PartCosts(embedding=embedding, layer=layer, head=head)
    found = costs.of_stages(balanced_layers(layers, stages, costs))
    others = [costs.of_stages(partition) for partition in all_partitions(layers, stages)]
    assert max(found) == min(max(other) for other in others)
    assert sum(c * c for c in found) == min(sum(c * c for c in other) for other in others)


@given(st.integers(1, 200), st.data(), COST, COST, COST)
def test_stages_are_runs_that_cover_every_layer_once(layers, data, embedding, layer, head) -> None:
    stages = data.draw(st.integers(1, layers))
    found = balanced_layers(layers, stages, PartCosts(embedding=embedding, layer=layer, head=head))
    assert len(found) == stages
    assert all(len(numbers) >= 1 for numbers in found)
    assert [number for numbers in found for number in numbers] == list(range(layers))


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    found = balanced_layers(12, 4, PartCosts(embedding=0, layer=2, head=3))
    assert [len(numbers) for numbers in found] == [4, 3, 3, 2]


def test_layout_counts_become_ranges() -> None:
    assert layer_ranges([0, 3, 2]) == [range(0), range(3), range(3, 5)]


def test_costs_add_up_to_the_model() -> None:
    model = ModelConfig(num_layers=6, hidden_size=32, num_attention_heads=4, vocab_size=500, max_position_embeddings=64)
    flops = part_costs(model, 64, "flops")
    assert sum(flops.of_stages(layer_ranges([2, 4]))) == forward_flops_per_token(model, 64)
    tied = part_costs(model, 64, "parameters")
    assert sum(tied.of_stages(layer_ranges([2, 4]))) == num_parameters(model).total + 512 * 32
    untied_model = model.model_copy(update={"untie_embeddings_and_output_weights": True})
    untied = part_costs(untied_model, 64, "parameters")
    assert sum(untied.of_stages(layer_ranges([2, 4]))) == num_parameters(untied_model).total


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 40), st.data())
def test_layers_of_different_costs_are_cut_so_that_the_costliest_stage_is_cheapest(layers, embedding, head, data):
    stages = data.draw(st.integers(1, len(layers)))
    costs = PartCosts(embedding=embedding, layers=tuple(layers), head=head)
    found = balanced_layers(len(layers), stages, costs)
    assert [number for run in found for number in run] == list(range(len(layers)))
    assert len(found) == stages
    assert min(map(len, found)) >= 1
    every = all_partitions(len(layers), stages)
    assert max(costs.of_stages(found)) == min(max(costs.of_stages(one)) for one in every)
