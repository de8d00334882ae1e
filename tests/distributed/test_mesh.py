"""The mesh of ranks: pure arithmetic, so every law is a property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.distributed.groups import DATA, MODEL_COPY, WEIGHTS
from megalm.distributed.mesh import Axis, Mesh
from megalm.errors import ConfigError, LayoutError

SIZES = st.integers(1, 4)
MESHES = st.builds(Mesh, pp=SIZES, dp=SIZES, cp=SIZES, tp=SIZES)


@given(MESHES)
def test_rank_and_coordinate_are_inverse(mesh: Mesh) -> None:
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(coordinate) for coordinate in coordinates] == list(range(mesh.world_size))
    for coordinate in coordinates:
        assert all(0 <= coordinate[axis] < mesh.size(axis) for axis in Axis)


@given(MESHES, st.sampled_from(Axis))
def test_groups_of_an_axis_partition_the_ranks(mesh: Mesh, axis: Axis) -> None:
    groups = mesh.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(axis)}


@given(MESHES, st.sampled_from(Axis))
def test_ranks_of_a_group_differ_only_along_its_axis_and_stand_in_its_order(mesh: Mesh, axis: Axis) -> None:
    for group in mesh.groups(axis):
        coordinates = [mesh.coordinate(rank) for rank in group]
        assert [coordinate[axis] for coordinate in coordinates] == list(range(mesh.size(axis)))
        assert len({tuple(coordinate[other] for other in Axis if other is not axis) for coordinate in coordinates}) == 1


@given(MESHES)
def test_ranks_with_the_same_weights_and_ranks_of_one_copy_meet_in_one_rank(mesh: Mesh) -> None:
    same_weights, copies = mesh.groups(*WEIGHTS), mesh.groups(*MODEL_COPY)
    assert {len(ranks) for ranks in same_weights} == {mesh.dp * mesh.cp}
    assert {len(ranks) for ranks in copies} == {mesh.pp * mesh.tp}, "no part of a copy twice"
    assert all(len(set(one) & set(other)) == 1 for one in same_weights for other in copies)
    for groups in (same_weights, copies):
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(mesh.world_size))
        assert all(ranks == sorted(ranks) for ranks in groups)


def test_context_parallel_ranks_have_the_same_samples_and_weights() -> None:
    mesh = Mesh(pp=2, dp=1, cp=2, tp=2)
    assert mesh.groups(*DATA) == [[rank] for rank in range(8)]
    assert mesh.groups(*WEIGHTS) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups(*MODEL_COPY) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert Mesh(pp=1, dp=2, cp=2, tp=2).groups(*WEIGHTS) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_tensor_parallel_ranks_are_neighbours_and_pipeline_stages_are_far_apart() -> None:
    mesh = Mesh(pp=2, dp=2, cp=1, tp=2)
    assert mesh.groups(Axis.TP) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups(Axis.DP) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups(Axis.PP) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@given(SIZES, SIZES, SIZES, SIZES)
def test_the_data_parallel_size_is_what_the_other_axes_leave(pp: int, dp: int, cp: int, tp: int) -> None:
    assert Mesh.of(pp * dp * cp * tp, pp=pp, cp=cp, tp=tp) == Mesh(pp=pp, dp=dp, cp=cp, tp=tp)


def test_a_mesh_prints_its_equation() -> None:
    assert str(Mesh(pp=2, dp=3, cp=1, tp=4)) == "world 24 = pp 2 x dp 3 x cp 1 x tp 4"


@pytest.mark.parametrize(
    ("world_size", "sizes", "equation", "advice"),
    [
        (6, {"pp": 2, "tp": 2}, "world 6 = pp 2 x cp 1 x tp 2 x dp ?", "start 4 or 8 ranks"),
        (1, {"tp": 2}, "world 1 = pp 1 x cp 1 x tp 2 x dp ?", "start 2 ranks"),
        (9, {"cp": 8}, "world 9 = pp 1 x cp 8 x tp 1 x dp ?", "start 8 or 16 ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_the_equation_and_the_nearest_counts(
    world_size: int, sizes: dict[str, int], equation: str, advice: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        Mesh.of(world_size, **sizes)
    assert equation in str(caught.value)
    assert advice in str(caught.value)
    assert caught.value.exit_code == ConfigError.exit_code
