"""Many ranks in one job: every process reads srun's environment, joins the others and finds itself on one mesh."""

import multiprocessing
import os
from typing import Any

import pytest

import megalm.testing.spawner  # noqa: F401  (its preloaded server starts each rank in milliseconds)

RANKS_PER_NODE = 8


@pytest.mark.parametrize("ranks", [16, pytest.param(64, marks=pytest.mark.long)])
def test_the_ranks_of_srun_agree_on_the_layout(ranks: int) -> None:
    context = multiprocessing.get_context("forkserver")
    answers: Any = context.Queue()
    processes = [context.Process(target=join, args=(rank, ranks, answers), daemon=True) for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        told = dict(answers.get(timeout=240) for _ in processes)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    assert sorted(told) == list(range(ranks))
    seen, _ = told[0]
    assert len({tuple(place.items()) for place in seen}) == ranks, "each rank has a place of its own"
    for rank, (places, groups) in told.items():
        assert places == seen, "all ranks see the same layout"
        for axis, members in groups.items():
            assert rank in members
            assert all(same_but(axis, seen[rank], seen[member]) for member in members)
    assert [process.exitcode for process in processes] == [0] * ranks


def same_but(axis: str, one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one[name] == other[name] for name in one if name != axis)


def join(rank: int, count: int, answers: Any) -> None:
    """What rank `rank` of `count` sees: everybody's place on the mesh, and the members of its groups."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        os.environ.pop(name, None)
    node, local = divmod(rank, RANKS_PER_NODE)
    nodes = count // RANKS_PER_NODE
    os.environ |= {
        "SLURM_JOB_ID": str(os.getppid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_TASKS_PER_NODE": f"{RANKS_PER_NODE}(x{nodes})",
        "SLURM_STEP_NODELIST": f"localhost,n[2-{nodes}]", "SLURM_PROCID": str(rank), "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    from megalm.distributed.environment import prepare_process, read_environment
    from megalm.distributed.groups import MeshGroups
    from megalm.distributed.mesh import Axis, Mesh
    from megalm.distributed.process_group import start_process_group, stop_process_group

    torch.set_num_threads(1)
    environment = read_environment()
    prepare_process(environment)
    start_process_group(environment, "gloo", 4.0)
    mesh = Mesh.of(environment.world_size, pp=count // 16 * 2, cp=2, tp=2)
    groups = MeshGroups.build(mesh)
    places: list[Any] = [None] * count
    dist.all_gather_object(places, {axis.value: place for axis, place in mesh.coordinate(groups.global_rank).items()})
    members = {
        axis.value: dist.get_process_group_ranks(groups.by_axis[axis].group) for axis in Axis if mesh.size(axis) > 1
    }
    stop_process_group()
    answers.put((rank, (places, members)))
