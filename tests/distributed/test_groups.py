"""A rank's groups on a mesh with all kinds of axes, as the ranks themselves see them, and what DeepSpeed is told."""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megalm.distributed.groups import MODEL_COPY, WEIGHTS, MeshGroups, RankGroup
from megalm.distributed.mesh import Axis, Mesh
from megalm.engine.mpu import DeepSpeedMpu
from megalm.testing.spawner import run_on_ranks


def members(ranks: RankGroup) -> list[int]:
    found = dist.get_process_group_ranks(ranks.group)
    assert (dist.get_rank(ranks.group), len(found)) == (ranks.rank, ranks.size)
    return found


def groups_of_this_rank(mesh: Mesh) -> dict[str, list[int]]:
    groups = MeshGroups.build(mesh)
    mpu = DeepSpeedMpu(groups)
    assert groups.global_rank == dist.get_rank()
    assert {axis: ranks.rank for axis, ranks in groups.by_axis.items()} == mesh.coordinate(dist.get_rank())
    assert (groups.tensor, groups.pipeline) == (groups.by_axis[Axis.TP], groups.by_axis[Axis.PP])
    return {
        "data": members(groups.data),
        "weights": members(groups.weights),
        "copy": members(groups.model_copy),
        "mpu data": dist.get_process_group_ranks(mpu.get_data_parallel_group()),
        "mpu model": dist.get_process_group_ranks(mpu.get_model_parallel_group()),
    }


def test_groups_by_meaning_with_context_parallelism() -> None:
    for mesh in (Mesh(dp=2, cp=2, tp=1), Mesh(cp=2, tp=2), Mesh(pp=2, cp=2)):
        for rank, found in enumerate(run_on_ranks(4, groups_of_this_rank, mesh)):
            weights = next(ranks for ranks in mesh.groups(*WEIGHTS) if rank in ranks)
            copy = next(ranks for ranks in mesh.groups(*MODEL_COPY) if rank in ranks)
            data = next(ranks for ranks in mesh.groups(Axis.DP) if rank in ranks)
            assert found == {"data": data, "weights": weights, "copy": copy, "mpu data": weights, "mpu model": copy}


def time_limits(mesh: Mesh) -> set[float]:
    """Of all groups that this rank knows: the job's, the mesh's, and one as DeepSpeed makes it, without a limit."""
    groups = MeshGroups.build(mesh)
    groups.subgroup(Axis.PP, [0])
    dist.new_group([0, 1])
    known = [group for group in distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]
    assert len(known) >= 4
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in known}


def test_the_jobs_time_limit_holds_for_every_group_whoever_makes_it() -> None:
    assert run_on_ranks(4, time_limits, Mesh(pp=2, tp=2), timeout_s=60) == [{120.0}] * 4
