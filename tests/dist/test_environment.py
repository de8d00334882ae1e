"""What launchers say in the environment becomes a place in the job, or an error that names the variable."""

import os
from dataclasses import replace

import pytest

from megalm.dist.environment import LaunchEnvironment, choose_accelerator, prepare_process, read_environment
from megalm.errors import PlatformError

PLACE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
DEEPSPEED = PLACE | {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
TORCHRUN = PLACE | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "1"}
ALONE = read_environment({})


@pytest.mark.parametrize(("environ", "launcher"), [(DEEPSPEED, "deepspeed"), (TORCHRUN, "torchrun")])
def test_launchers_are_understood(environ: dict[str, str], launcher: str) -> None:
    assert read_environment(environ) == LaunchEnvironment(
        launcher=launcher,
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node-1",
        master_port=29500,
    )


def test_without_launcher_variables_it_is_one_process() -> None:
    assert (ALONE.rank, ALONE.world_size, ALONE.local_rank, ALONE.local_world_size) == (0, 1, 0, 1)
    assert ALONE.is_first
    assert not read_environment(DEEPSPEED).is_first


def test_without_a_local_size_all_ranks_are_on_one_machine() -> None:
    assert read_environment(PLACE).local_world_size == 8


@pytest.mark.parametrize("name", PLACE)
def test_incomplete_variables_are_refused_by_name(name: str) -> None:
    present = {key: value for key, value in PLACE.items() if key != name}
    with pytest.raises(PlatformError, match=rf"but not {name};"):
        read_environment(present)


def test_every_missing_variable_is_named() -> None:
    with pytest.raises(PlatformError, match="has RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        read_environment({"RANK": "0"})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE='two' in the environment must be a whole number"),
        ("MASTER_PORT", "", "MASTER_PORT='' in the environment must be a whole number"),
        ("RANK", "8", "RANK=8 must be at least 0 and below WORLD_SIZE=8"),
        ("RANK", "-1", "RANK=-1 must be at least 0 and below WORLD_SIZE=8"),
        ("LOCAL_RANK", "4", "LOCAL_RANK=4 must be at least 0 and below LOCAL_SIZE=4"),
        ("LOCAL_SIZE", "0", "LOCAL_RANK=1 must be at least 0 and below LOCAL_SIZE=0"),
    ],
)
def test_contradictory_variables_are_refused(name: str, value: str, text: str) -> None:
    with pytest.raises(PlatformError, match=text):
        read_environment(DEEPSPEED | {name: value})


SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("tasks_per_node", "tasks", "node", "local_size"),
    [("4", 4, 0, 4), ("2(x3)", 6, 2, 2), ("4(x2),3", 11, 1, 4), ("4(x2),3", 11, 2, 3), ("1,5", 6, 1, 5)],
)
def test_tasks_of_srun_are_ranks_once_they_know_where_to_meet(
    tasks_per_node: str, tasks: int, node: int, local_size: int
) -> None:
    step = {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NODEID": str(node)}
    assert read_environment(SRUN | MEETING | step | {"SLURM_LOCALID": "1"}) == LaunchEnvironment(
        launcher="srun",
        rank=2,
        world_size=tasks,
        local_rank=1,
        local_world_size=local_size,
        master_addr="n1",
        master_port=29500,
    )


def test_a_job_of_one_task_needs_no_other_script_than_one_of_many() -> None:
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    place = read_environment(SRUN | MEETING | one | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert (place.rank, place.world_size, place.local_world_size) == (0, 1, 1)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (SRUN, "SLURM_STEP_NUM_TASKS=4"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "3", "PMI_RANK": "1"}, "PMI_SIZE=3"),
    ],
)
def test_many_tasks_that_do_not_know_of_each_other_are_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(
        PlatformError, match=f"{named} but RANK and WORLD_SIZE are not set: each task would train alone"
    ):
        read_environment(environ)


def test_a_launcher_inside_a_task_of_srun_is_what_counts() -> None:
    assert read_environment(SRUN | DEEPSPEED).rank == 5


@pytest.mark.parametrize(
    "environ",
    [
        # slurmstepd gives a batch script the whole job's task count and SLURM_PROCID=0, though it is one process
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["sbatch script", "srun -n 1", "mpirun -n 1"],
)
def test_one_process_under_a_scheduler_may_train_alone(environ: dict[str, str]) -> None:
    assert read_environment(environ).world_size == 1


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    environ: dict[str, str] = {}
    assert prepare_process(replace(ALONE, world_size=8, local_world_size=4), environ) == 2
    assert environ["OMP_NUM_THREADS"] == "2"


def test_more_ranks_than_cores_still_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert prepare_process(replace(ALONE, world_size=4, local_world_size=4), {}) == 1


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("", 10), ("0", 10), ("many", 10)])
def test_the_users_thread_count_is_respected_if_it_is_one(
    monkeypatch: pytest.MonkeyPatch, given: str, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    environ = {"OMP_NUM_THREADS": given}
    assert prepare_process(ALONE, environ) == threads
    assert environ["OMP_NUM_THREADS"] == str(threads)


def test_deepspeed_finds_a_complete_environment() -> None:
    environ: dict[str, str] = {}
    prepare_process(ALONE, environ)
    assert read_environment(environ) == replace(ALONE, launcher="deepspeed")


def test_the_accelerator_is_chosen_once_and_the_users_choice_stays() -> None:
    environ: dict[str, str] = {}
    choose_accelerator(False, environ)
    assert environ == {"DS_ACCELERATOR": "cpu"}
    choose_accelerator(True, environ)
    assert environ == {"DS_ACCELERATOR": "cpu"}
