"""What launchers say in the environment becomes a place in the job, or an error that names the variable."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.distributed.environment import (
    LaunchEnvironment,
    choose_accelerator,
    prepare_process,
    read_environment,
    seconds_since_start,
)
from megalm.distributed.network import interface_towards
from megalm.distributed.slurm import first_node
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
        agent_store=launcher == "torchrun",
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


SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "localhost,n[2-4]",
}  # fmt: skip
"""Task 2 of `srun -N4 -n4`; the first node has a name that resolves."""
ONE_NODE = SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("tasks_per_node", "tasks", "node", "local_size"),
    [("4", 4, 0, 4), ("2(x3)", 6, 2, 2), ("4(x2),3", 11, 1, 4), ("4(x2),3", 11, 2, 3), ("1,5", 6, 1, 5)],
)
def test_a_task_of_srun_is_a_rank(tasks_per_node: str, tasks: int, node: int, local_size: int) -> None:
    step = {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NODEID": str(node)}
    launch = read_environment(SRUN | step)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("srun", 2, tasks, 0)
    assert (launch.local_world_size, launch.master_addr) == (local_size, "localhost")


def test_the_meeting_place_follows_from_the_job_and_all_its_tasks_agree() -> None:
    launches = [read_environment(SRUN | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)}) for task in range(4)]
    assert len({(launch.master_addr, launch.master_port, launch.other_ports, launch.job) for launch in launches}) == 1
    ports = [launches[0].master_port, *launches[0].other_ports]
    assert len(set(ports)) == len(ports) > 4
    assert all(1024 < port < 32768 for port in ports), "below the ports that kernels give to clients"


def test_under_an_arbitrary_distribution_rank_0_is_on_the_first_host_of_the_users_list(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("\nlocalhost\nn2\n")
    arbitrary = SRUN | {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_STEP_NODELIST": "n2,localhost,n[3-4]"}
    assert read_environment(arbitrary | {"SLURM_HOSTFILE": str(hosts)}).master_addr == "localhost"
    assert read_environment(arbitrary | {"SLURM_ARBITRARY_NODELIST": "localhost,n2"}).master_addr == "localhost"
    assert read_environment(arbitrary | {"MASTER_ADDR": "n7"}).master_addr == "n7"
    with pytest.raises(PlatformError, match="is the first of SLURM_HOSTFILE, which is not set and so does not tell it"):
        read_environment(arbitrary)


@given(st.integers(1, 10**8), st.integers(1, 300), st.integers(0, 200))
def test_jobs_that_may_share_a_node_meet_at_different_ports(job: int, later: int, step: int) -> None:
    def first_port(number: int, step: int = 0) -> int:
        launch = read_environment(SRUN | {"SLURM_JOB_ID": str(number), "SLURM_STEP_ID": str(step)})
        return launch.master_port

    assert first_port(job) != first_port(job + later)
    assert first_port(job, step) != first_port(job, step + 1)


def test_a_job_of_one_node_meets_on_the_loopback() -> None:
    assert read_environment(ONE_NODE).master_addr == "127.0.0.1"


def test_the_batch_script_may_say_where_to_meet() -> None:
    launch = read_environment(SRUN | {"MASTER_ADDR": "n7", "MASTER_PORT": "1234"})
    assert (launch.master_addr, launch.master_port, launch.other_ports) == ("n7", 1234, ())
    assert read_environment(SRUN | {"MASTER_ADDR": "n7"}).other_ports != ()


def test_a_requeued_job_does_not_meet_ranks_of_its_last_start() -> None:
    assert read_environment(SRUN).job != read_environment(SRUN | {"SLURM_RESTART_COUNT": "1"}).job


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-4]", "n1"), ("n[03-07,9],login", "n03"), ("a1,b[2-3]", "a1"), ("r[1-2]n[5,7]", "r1n5")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_node_without_an_address_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PlatformError, match="first node, no-such-node, but that name has no address"):
        read_environment(SRUN | {"SLURM_STEP_NODELIST": "no-such-node"})


def test_variables_of_another_step_are_refused() -> None:
    with pytest.raises(PlatformError, match="does not describe node 2"):
        read_environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"})
    with pytest.raises(PlatformError, match="but not SLURM_LOCALID"):
        read_environment({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize("own", [{"PMI_RANK": "2", "PMI_SIZE": "4"}, {"PMIX_RANK": "2"}], ids=["pmi2", "pmix"])
def test_sruns_own_pmi_is_no_mpirun(own: dict[str, str]) -> None:
    assert read_environment(SRUN | own) == read_environment(SRUN)


OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5",
}  # fmt: skip
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "PMI_FD": "9"}


@pytest.mark.parametrize("environ", [OPENMPI, HYDRA], ids=["OpenMPI", "MPICH"])
def test_a_rank_of_mpirun_that_is_told_where_to_meet_needs_no_mpi(environ: dict[str, str]) -> None:
    inside_slurm = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    for around in ({}, inside_slurm):  # mpirun starts its daemons by srun, one a node
        assert read_environment(around | environ | MEETING) == LaunchEnvironment(
            launcher="mpirun", rank=5, world_size=8, local_rank=1, local_world_size=4, master_addr="n1",
            master_port=29500,
        )  # fmt: skip


MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
HAND = {"LOCAL_RANK": "0", **MEETING}


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (HAND | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 in each of {size}=4 tasks: each would train alone"),
        (HAND | {"RANK": "0", "WORLD_SIZE": "4"}, "RANK=0 contradicts {rank}=2"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "{size}=4 tasks each run a launcher that knows of GROUP_WORLD_SIZE=1"),
        (DEEPSPEED | {"CROSS_SIZE": "1"}, "{size}=4 tasks each run a launcher that knows of CROSS_SIZE=1"),
    ],
    ids=["one-rank jobs", "RANK exported once", "torchrun apart", "deepspeed apart"],
)
@pytest.mark.parametrize(
    ("outer", "rank", "size"),
    [
        (SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"},
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, "PMI_RANK", "PMI_SIZE"),
    ],
    ids=["srun", "OpenMPI", "MPICH"],
)
def test_tasks_that_would_train_apart_are_refused(
    outer: dict[str, str], rank: str, size: str, inner: dict[str, str], text: str
) -> None:
    with pytest.raises(PlatformError, match=text.format(rank=rank, size=size)):
        read_environment(outer | inner)


def test_many_runs_of_mpirun_inside_srun_are_refused() -> None:
    with pytest.raises(PlatformError, match="OMPI_COMM_WORLD_SIZE=1 in a step of SLURM_STEP_NUM_TASKS=4 tasks"):
        read_environment(SRUN | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})


def test_a_launcher_in_one_task_a_node_is_what_counts() -> None:
    assert read_environment(SRUN | TORCHRUN | {"GROUP_WORLD_SIZE": "4"}).rank == 5
    assert read_environment(SRUN | DEEPSPEED | {"CROSS_SIZE": "4"}).rank == 5
    own = HAND | {"RANK": "2", "WORLD_SIZE": "4"}
    assert read_environment(SRUN | own).rank == 2


@pytest.mark.parametrize(
    "environ",
    [
        # slurmstepd gives a batch script the whole job's task count and SLURM_PROCID=0, though it is one process
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        ONE_NODE | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0",
                    "SLURM_STEP_TASKS_PER_NODE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["sbatch script", "srun -n 1", "mpirun -n 1"],
)  # fmt: skip
def test_one_process_under_a_scheduler_may_train_alone(environ: dict[str, str]) -> None:
    assert read_environment(environ).world_size == 1


def test_one_process_in_a_job_of_many_tasks_says_so() -> None:
    launch = read_environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert "one process trains, though this job has 4 tasks" in launch.note


def test_a_network_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(PlatformError, match=r"GLOO_SOCKET_IFNAME=ib9 is no network interface of .*; it has .*lo"):
        read_environment({"GLOO_SOCKET_IFNAME": "lo,ib9"})


def test_ranks_of_one_machine_talk_over_the_loopback_unless_the_user_chooses() -> None:
    environ: dict[str, str] = {}
    prepare_process(read_environment(ONE_NODE), environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"
    environ = {"GLOO_SOCKET_IFNAME": "eth0"}
    prepare_process(read_environment(ONE_NODE), environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth0"
    environ = {}
    prepare_process(read_environment(TORCHRUN), environ)
    assert environ.get("GLOO_SOCKET_IFNAME") == interface_towards("node-1"), "these ranks are on several machines"


def test_a_job_uses_no_more_cores_than_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    assert prepare_process(ALONE, {"SLURM_CPUS_ON_NODE": "3"}) == 3


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


def test_a_task_of_srun_is_as_old_as_the_launcher_in_it() -> None:
    assert 0 < seconds_since_start({}) < seconds_since_start({"SLURM_TASK_PID": "1"})


@pytest.mark.parametrize("around", [SRUN, OPENMPI | MEETING, HYDRA | MEETING], ids=["srun", "OpenMPI", "MPICH"])
@pytest.mark.parametrize("names", [("WORLD_SIZE",), ("RANK", "WORLD_SIZE"), ("LOCAL_RANK",)])
def test_what_tutorials_export_beside_a_scheduler_must_only_agree_with_it(
    around: dict[str, str], names: tuple[str, ...]
) -> None:
    plain = read_environment(around | MEETING)
    said = {"RANK": plain.rank, "WORLD_SIZE": plain.world_size, "LOCAL_RANK": plain.local_rank}
    right = {name: str(said[name]) for name in names}
    assert read_environment(around | MEETING | right) == plain
    for name in names:
        with pytest.raises(PlatformError, match=f"{name}=77 in the environment, but {plain.launcher} says"):
            read_environment(around | MEETING | right | {name: "77"})


@pytest.mark.parametrize(
    ("words", "types"),
    [
        (["bash"], True), (["-bash"], True), (["/bin/zsh", "-l"], True), (["bash", "-i"], True),
        (["bash", "job.sh"], False), (["bash", "-c", "python x"], False), (["python", "x.py"], False), ([], False),
    ],
)  # fmt: skip
def test_a_process_in_the_shell_of_srun_pty_is_no_rank(
    words: list[str], types: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr("psutil.Process", lambda pid: shell)
    environ = ONE_NODE | {"SLURM_PTY_PORT": "4711", "SLURM_TASK_PID": "7", "PMI_RANK": "2", "PMI_SIZE": "4"}
    launch = read_environment(environ)
    assert (launch.world_size == 1) == types
    assert ("step of 4 tasks (srun --pty)" in launch.note) == types
    inner = TORCHRUN | {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "8"}
    if types:
        assert read_environment(environ | inner).rank == 5
    assert read_environment({**environ, "SLURM_PTY_PORT": ""} | {"SLURM_TASK_PID": ""}).world_size == 4


def test_a_job_that_the_launcher_starts_again_says_so() -> None:
    assert read_environment(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}).restart == 2
    assert read_environment(SRUN | {"SLURM_RESTART_COUNT": "1"}).restart == 1
    assert ALONE.restart == 0
