"""What `megalm submit` writes and prints without a cluster; what it refuses."""

import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm import cli
from megalm.distributed.environment import captured_environment
from megalm.errors import ConfigError, PlatformError
from megalm.launching.cluster import NodeKind, Partition, with_defaults
from megalm.launching.commands import read_hostfile, which_mpi
from megalm.launching.job import Job, time_seconds
from megalm.launching.site import Site, read_site
from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import write_recipe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MEGALM_"))]:
        monkeypatch.delenv(name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "mpirun"):
        found = shutil.which(name)
        if found:
            (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{programs}")
    write_recipe(tmp_path)


def submit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str, save: bool = True, dry: bool = True
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call."""
    run = ["--save", str(tmp_path / "run")] if save else []
    always = ["submit", "--config", str(tmp_path / "tiny.yaml"), *run, *(["--dry-run"] if dry else [])]
    code = cli.main([*always, *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_dry_run_prints_a_whole_script_and_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, script, said = submit(
        capsys, tmp_path, "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12", "--partition", "gpu",
        "--micro-batch-size", "1", "--lr", "0.001",
    )  # fmt: skip
    assert code == 0, said
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --time=1-12",
        "#SBATCH --partition=gpu", "#SBATCH --signal=USR1@300", "#SBATCH --requeue", "#SBATCH --export=NIL",
        f"run={tmp_path}/run", "    --lr 0.001",
    ):  # fmt: skip
        assert line in script.splitlines(), script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not (tmp_path / "run").exists()


def test_the_environment_is_in_the_script_and_secrets_are_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matters = ("NCCL_SOCKET_NTHREADS", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "XDG_CACHE_HOME")
    for name in (*matters, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "4")
    left = ("HF_TOKEN", "WANDB_API_KEY", "NCCL_PASSWORD", "UNRELATED")
    for name in left:
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:canary@host/")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    _, script, said = submit(capsys, tmp_path, "--nodes", "4", "--gpus-per-node", "1", "--time", "10")
    for name in matters:
        assert f"export {name}=4" in script.splitlines()
    assert "CUDA_VISIBLE_DEVICES" not in script + said, "SLURM chooses it for each job"
    assert f"export PATH={shlex.quote(os.environ['PATH'])}" in script
    assert "canary" not in script + said
    for name in left[:3]:
        assert name in said, "what the job does not get is said"
    assert "note: SBATCH_PARTITION of this shell does not count" in said
    assert not any(name in said for name in ("SHLVL", "PWD", "PYTEST"))


def test_what_looks_like_a_secret_is_never_captured() -> None:
    given = {
        "PATH": "/bin",
        "HF_HUB_TOKEN": "x",
        "MEGALM_AUTH": "x",
        "HF_HOME": "/a",
        "NCCL_X": "ftp://a:b@c",
        "X": "1",
    }
    assert captured_environment(given) == {"PATH": "/bin", "HF_HOME": "/a"}


def test_names_with_blanks_and_shell_characters_stay_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save = str(tmp_path / "a run; touch $(echo x) 'q'")
    script = submit(
        capsys, tmp_path, "--save", save, "--nodes", "4", "--gpus-per-node", "1", "--time", "10", save=False
    )[1]
    text = script[script.index("run=") : script.index("flags=(")]
    told = subprocess.run(["bash", "-c", text + 'printf %s "$run"'], capture_output=True, text=True, cwd=tmp_path)
    assert told.stdout == save
    assert not (tmp_path / "x").exists()


def test_the_site_file_counts_and_the_command_line_counts_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: a\naccount: b\nsbatch: [--exclusive]\nnetwork_interface: ib0\n"
        "setup: [module load cuda, ulimit -n]\n"
        "environment: {NCCL_IB_TIMEOUT: 22, UCX_TLS: 'rc,sm', NCCL_DEBUG: true}\n"
    )
    monkeypatch.setenv("MEGALM_SITE", str(site))
    script = submit(
        capsys, tmp_path, "--nodes", "4", "--gpus-per-node", "1", "--time", "10", "--partition", "c"
    )[1].splitlines()  # fmt: skip
    for line in (
        "#SBATCH --partition=c", "#SBATCH --account=b", "#SBATCH --exclusive", "export NCCL_IB_TIMEOUT=22",
        "export UCX_TLS=rc,sm", "export GLOO_SOCKET_IFNAME=ib0", "export NCCL_SOCKET_IFNAME=ib0", "export NCCL_DEBUG=1",
        "module load cuda", "ulimit -n",
    ):  # fmt: skip
        assert line in script


def test_containers_are_text_in_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("--nodes", "4", "--gpus-per-node", "1", "--time", "10", "--container-image", "/i/m.sqsh",
             "--container-mounts", "/data")  # fmt: skip
    pyxis = submit(capsys, tmp_path, *asked)[1]
    assert "--container-image=/i/m.sqsh" in pyxis
    assert f'--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data,"$run:$run"' in pyxis
    apptainer = submit(capsys, tmp_path, *asked, "--container-runtime", "apptainer")[1]
    assert f'apptainer exec --nv --pwd "$PWD" --bind {REPOSITORY},/data,"$run" /i/m.sqsh python -u' in apptainer


def test_a_sweep_is_an_array_of_all_combinations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = submit(
        capsys, tmp_path, "--nodes", "4", "--gpus-per-node", "1", "--time", "10", "--array-limit", "2",
        "--sweep", "lr=0.001,0.002", "--sweep", "seed=1,2",
    )[1]  # fmt: skip
    assert "#SBATCH --array=0-3%2" in script
    assert f"2) run={tmp_path}/run/lr=0.002,seed=1 " in script
    assert "varied=(--lr 0.002 --seed 1)" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_switch_is_swept_by_true_and_false(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("--nodes", "4", "--gpus-per-node", "1", "--time", "10", "--sweep", "qk_layernorm=true,false")
    script = submit(capsys, tmp_path, *asked)[1]
    assert "varied=(--qk-layernorm)" in script
    assert "varied=(--no-qk-layernorm)" in script
    assert f"run={tmp_path}/run/qk-layernorm=false " in script


def test_fresh_counts_at_the_first_start_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = submit(capsys, tmp_path, "--nodes", "4", "--gpus-per-node", "1", "--time", "10", "--fresh")[1]
    assert '[ "$restart" -gt 0 ] || flags+=(--fresh)' in script
    assert "    --fresh" not in script.splitlines()


SIZE = ("--nodes", "4", "--gpus-per-node", "1")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((*SIZE,), "--time is missing"),
        ((*SIZE, "--time", "soon"), "--time soon is no time limit"),
        ((*SIZE, "--time", "1", "--signal-before", "60"), "--signal-before 60 must be less than the 60 s"),
        (("--nodes", "3", "--gpus-per-node", "1", "--time", "10"), "global_batch_size=8 = micro_batch_size=2 x dp 3"),
        ((*SIZE, "--time", "10", "--tensor-model-parallel-size", "3"), "tensor_model_parallel_size=3"),
        ((*SIZE, "--time", "10", "--config", "/no/such.yaml"), "/no/such.yaml"),
        ((*SIZE, "--time", "10", "--script", "no/such.py"), "--script no/such.py does not exist"),
        ((*SIZE, "--time", "10", "--partitoin", "x"), 'unknown option --partitoin; did you mean "--partition"?'),
        ((*SIZE, "--time", "10", "--sweep", "lr"), "--sweep lr must be a flag and different values"),
        ((*SIZE, "--time", "10", "--sweep", "lr=0.001,fast"), "lr=fast"),
        ((*SIZE, "--time", "10", "--sweep", "lr=1e-3,1e-03"), "different values"),
        ((*SIZE, "--time", "10", "--sweep", "qk_layernorm=true,True"), "different values"),
        ((*SIZE, "--time", "10", "--array-limit", "2"), "--array-limit is about the runs of a --sweep"),
        ((*SIZE, "--time", "10", "--sweep", "load=/a/b,/a_b"), "two runs of the sweep would share the folder"),
        ((*SIZE, "--time", "10", "--site", "/no/site.yaml"), "--site /no/site.yaml cannot be read"),
        ((*SIZE, "--time", "10", "--chain", "2", "--fresh"), "--fresh and --chain exclude each other"),
        ((*SIZE, "--time", "10", "--save", "/a\\b"), "--save /a\\b has a backslash"),
        ((*SIZE, "--time", "10", "--job-name", "a\nb"), "'a\\nb' has a line break"),
        ((*SIZE, "--time", "10", "--mem", "much"), "--mem=much must be a number with K, M, G or T"),
        ((*SIZE, "--time", "10", "--partition", ""), '--partition= must be a name, not ""'),
        (
            (*SIZE, "--time", "10", "--sbatch=--nodes=3"),
            "--sbatch=--nodes=3: the script decides about --nodes; give",
        ),
        ((*SIZE, "--time", "10", "--sbatch", "exclusive"), "sbatch: 'exclusive' must be one option"),
        (
            (*SIZE, "--time", "10", "--gres", "gpu:4"),
            "--gres gpu:4 is an option of sbatch; hand it on: --sbatch=--gres=",
        ),
        ((*SIZE, "--time", "10", "--exclusive"), "hand it on: --sbatch=--exclusive"),
        ((*SIZE, "--time", "10", "--exclude=n7"), "hand it on: --sbatch=--exclude=n7"),
        ((*SIZE, "--time", "10", "-w", "n[1-2]"), "hand it on: --sbatch=--nodelist=n[1-2]"),
        ((*SIZE, "--time", "10", "--reservation", "r"), "hand it on: --sbatch=--reservation=r"),
        ((*SIZE, "--time", "10", "--dependency=after:1"), "hand it on: --sbatch=--dependency=after:1"),
        ((*SIZE, "--time", "10", "--mail-type", "END"), "hand it on: --sbatch=--mail-type=END"),
        (
            (*SIZE, "--time", "10", "-n", "8"),
            "-n 8 is an option of sbatch about which the script decides; give --nodes",
        ),
        ((*SIZE, "--time", "10", "--output", "log"), "the logs are in the run folder, under slurm/"),
        (("--nodes", "4", "--launcher", "deepspeed"), "needs --hostfile FILE"),
        (("--nodes", "4", "--launcher", "torchrun"), "needs --master-addr HOST"),
        (("--nodes", "4", "--launcher", "local"), "starts ranks on this machine only"),
        (("--nodes", "4", "--launcher", "mpirun", "--hostfile", "/no/hosts"), "--hostfile /no/hosts cannot be read"),
    ],
)
def test_what_cannot_be_is_one_error(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, said = submit(capsys, tmp_path, *words)
    assert (code, out) == (2, "")
    assert error in said
    assert said.count("megalm submit: error: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_job_needs_a_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, said = submit(capsys, tmp_path, *SIZE, "--time", "10", save=False)
    assert code == 2
    assert "give --save FOLDER" in said


def test_without_slurm_it_says_what_else_there_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, said = submit(capsys, tmp_path, *SIZE, "--time", "10", dry=False)
    assert code == PlatformError.exit_code
    assert "sinfo is not on PATH: this machine has no SLURM" in said
    assert not (tmp_path / "run").exists()


def test_unknown_keys_of_a_site_are_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("partitoin: gpu\n")
    with pytest.raises(ConfigError, match='unknown key partitoin; did you mean "partition"'):
        read_site(str(path), {})


def test_the_shipped_site_file_is_one() -> None:
    site = read_site(str(REPOSITORY / "launch/slurm/site.yaml"), {})
    assert site.variables()["NCCL_IB_TIMEOUT"] == "22"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12", 129600), ("1-2:3", 93780),
     ("1-2:3:4", 93784)],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


def test_commands_of_several_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# nodes\nn1 slots=2\nn2 slots=2\n")
    nodes = ("--nodes", "2", "--gpus-per-node", "2")
    two = (*nodes, "--hostfile", str(hosts))
    deepspeed = submit(capsys, tmp_path, *two, "--launcher", "deepspeed", "--master-port", "3000")[1]
    assert f"--hostfile {hosts} --num_nodes 2 --num_gpus 2 --master_port 3000 launch/pretrain_gpt.py" in deepspeed
    mpirun = submit(capsys, tmp_path, *two, "--launcher", "mpirun")[1]
    assert "-n 4" in mpirun
    assert "n1:2,n2:2" in mpirun or "-ppn 2 -hosts n1,n2" in mpirun
    torchrun = submit(capsys, tmp_path, *nodes, "--launcher", "torchrun", "--master-addr", "n1")[1].splitlines()
    assert [line.split("--node-rank ")[1][0] for line in torchrun] == ["0", "1"]


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("slurm", "-u -m megalm.pretrain_gpt "), ("srun", "-u -m megalm.pretrain_gpt --config"),
        ("deepspeed", "--num_accelerators 2 --module megalm.pretrain_gpt --config"),
        ("torchrun", " -m megalm.pretrain_gpt --config"), ("mpirun", "-u -m megalm.pretrain_gpt --config"),
        ("local", "--nproc-per-node 2 -m megalm.pretrain_gpt --config"),
    ],
)  # fmt: skip
def test_without_a_checkout_ranks_run_the_module(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = ("--time", "10") if launcher in ("slurm", "srun") else ()
    asked = ("--launcher", launcher, "--ntasks-per-node", "2", *limit)
    code, said, errors = submit(capsys, tmp_path, *asked)
    assert code == 0, errors
    assert words in said


def test_any_module_can_be_the_training_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = submit(capsys, tmp_path, "--launcher", "deepspeed", "--script", "megalm.pretrain_gpt")[1]
    assert "--module megalm.pretrain_gpt --config" in said
    for wrong in ("megalm.pretrain_bart", "no_such_package.pretrain"):
        code, _, errors = submit(capsys, tmp_path, "--launcher", "deepspeed", "--script", wrong)
        assert code == 2
        assert f"--script {wrong} does not exist; name a training script, or a module: megalm.pretrain_gpt" in errors


@pytest.mark.parametrize("line", ["n1", "n1 slots=x", "-oProxyCommand=x slots=1", "n1 slots=1 more"])
def test_hostfiles_are_checked(line: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"n0 slots=1\n{line}\n")
    with pytest.raises(ConfigError, match=":2: "):
        read_hostfile(path)


def test_mpi_flavours() -> None:
    assert which_mpi("mpirun (Open MPI) 4.1.4") == "openmpi"
    assert which_mpi("HYDRA build details:") == "mpich"
    with pytest.raises(PlatformError, match="knows OpenMPI, MPICH"):
        which_mpi("something")


def test_a_port_that_torchrun_would_stumble_over_is_one_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        code, _, said = submit(capsys, tmp_path, "--launcher", "torchrun", "--master-port", port, dry=False)
    assert code == PlatformError.exit_code
    assert said == f"megalm submit: error: --master-port {port} is taken on this machine; give another\n"


def test_the_printed_command_is_the_one_that_runs(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\nprintf "%s\\n" srun "$@"\nexit 7\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environ = quiet_environment() | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "megalm.cli", "submit", "--config", tmp_path / "tiny.yaml", "--save", tmp_path / "run",
         *SIZE, "--launcher", "srun"],
        cwd=REPOSITORY, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    printed, *ran = done.stdout.splitlines()
    assert shlex.split(printed) == ran
    assert done.returncode == 7, "the launcher's exit code is the command's"


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", ("--chain", "3", "--cpus-per-task", "4")), ("deepspeed", ("--time", "10")),
        ("local", ("--partition", "gpu")), ("mpirun", ("--node-rank", "0")), ("srun", ("--sweep", "lr=1,2")),
        ("torchrun", ("--hostfile", "hosts")), ("slurm", ("--hostfile", "hosts", "--time", "10")),
        ("slurm", ("--master-addr", "n1", "--time", "10")), ("local", ("--mem", "0", "--sbatch=--exclusive")),
        ("srun", ("--job-name", "x")), ("deepspeed", ("--no-requeue",)), ("srun", ("--container-image", "i.sif")),
    ],
)  # fmt: skip
def test_an_option_that_the_launcher_does_not_take_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, launcher: str, words: tuple[str, ...]
) -> None:
    code, out, said = submit(capsys, tmp_path, *SIZE, "--launcher", launcher, *words)
    assert (code, out) == (2, "")
    for flag in [word.partition("=")[0] for word in words if word.startswith("--") and word != "--time"]:
        assert f"{flag} says nothing to --launcher {launcher}, only to " in said


def test_short_options_are_those_of_sbatch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("-N", "4", "-t", "10", "-p", "gpu", "-A", "me", "-q", "high", "-C", "h100", "-J", "name", "-c", "3")
    script = submit(capsys, tmp_path, *asked, "--gpus-per-node", "1", "--mem", "64G", "--sbatch=--exclude=n7")[1]
    for option in ("nodes=4", "time=10", "partition=gpu", "account=me", "qos=high", "constraint=h100", "job-name=name",
                   "cpus-per-task=3", "mem=64G", "exclude=n7"):  # fmt: skip
        assert f"#SBATCH --{option}" in script.splitlines()


def job_with(**facts: Any) -> Job:
    plain: dict[str, Any] = {
        "script": "x", "flags": (), "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "folder": Path("/r"),
        "elements": (), "directory": Path("/"), "site": Site(),
    }  # fmt: skip
    return Job(**(plain | facts))


SMALL, LARGE = NodeKind(4, 0, 16, 1, 64_000), NodeKind(2, 0, 64, 2, 512_000)
GPUS = NodeKind(8, 8, 192, 2, 2_000_000)


@pytest.mark.parametrize(
    ("facts", "kinds", "expected"),
    [
        ({"ranks_per_node": 4}, (SMALL,), (4, "0")),
        ({"ranks_per_node": 4}, (SMALL, LARGE), (4, "0")),
        ({"ranks_per_node": 3}, (LARGE,), (20, "0")),
        ({"ranks_per_node": 2, "cpus_per_task": 4}, (SMALL,), (4, "32000M")),
        ({"ranks_per_node": 8, "gpus_per_node": 8}, (GPUS, LARGE), (24, "0")),
        ({"ranks_per_node": 2, "gpus_per_node": 2}, (GPUS,), (24, "500000M")),
        ({"ranks_per_node": 2, "gpus_per_node": 2, "site": Site(sbatch=("--exclusive",))}, (GPUS,), (24, "0")),
        ({"ranks_per_node": 1, "gpus_per_node": 1, "cpus_per_task": 96}, (GPUS,), (96, "1000000M")),
        ({"ranks_per_node": 4, "site": Site(sbatch=("--mem-per-cpu=1G", "-O"))}, (SMALL,), (None, None)),
        ({"ranks_per_node": 4, "mem": "3G"}, (SMALL,), (4, "3G")),
        ({"ranks_per_node": 4, "cpus_per_task": 2}, (NodeKind(1, 0, 16, 1, 1),), (2, None)),
        ({"ranks_per_node": 32}, (SMALL,), (None, None)),
    ],
)
def test_cores_and_memory_are_the_ranks_share_of_a_node(
    facts: dict[str, Any], kinds: tuple[NodeKind, ...], expected: tuple[int | None, str | None]
) -> None:
    job = with_defaults(job_with(**facts), Partition("infinite", kinds))
    assert (job.cpus_per_task, job.mem) == expected


@pytest.mark.parametrize(
    ("setup", "code", "says"),
    [
        ("export DEEP=1\nsource ENV/good.sh\n. ENV/good.sh", 0, "after 1"),
        ("grep -q x /dev/null || true\nif false; then :; fi\nset -e", 0, "after"),
        ("cd /nowhere", 6, "error: setup: of the site failed (exit code 1): cd /nowhere"),
        ("source ENV/missing.sh\ntrue", 6, "error: setup: of the site failed (exit code 1): source "),
        ("no-such-program load cuda\ntrue", 6, "error: setup: of the site failed (exit code 127): no-such-program"),
        (
            "activate() { false; return 3; }\nactivate x",
            6,
            "error: setup: of the site failed (exit code 3): activate x",
        ),
    ],
)
def test_setup_runs_as_in_the_users_shell_and_its_failure_ends_the_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setup: str, code: int, says: str
) -> None:
    (tmp_path / "good.sh").write_text('false\n[ -n "$UNSET" ] && echo x\necho "$PS1" >/dev/null\nfalse\ntrue\n')
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"setup": setup.replace("ENV", str(tmp_path))}))
    script = submit(capsys, tmp_path, *SIZE, "--time", "10", "--site", str(site))[1]
    assert script.startswith("#!/bin/bash -l\n")
    part = tmp_path / "job.sbatch"
    part.write_text(script[: script.index("flags=(")] + "echo after ${DEEP-} $-\n")
    done = subprocess.run(["bash", part], capture_output=True, text=True, env={"HOME": str(tmp_path)})
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    if not code:
        assert "u" in done.stdout.split()[-1], "the rest of the script is strict"
        assert "e" not in done.stdout.split()[-1]


def slurm_that_knows(folder: Path, queued: str) -> None:
    """Programs of SLURM: squeue shows `queued`, sbatch tells its SBATCH_* and submits."""
    programs = {
        "sinfo": "echo 'main*|5|4|1|1000|1:00:00|(null)'",
        "squeue": f"echo {queued}",
        "sbatch": f"env | grep SBATCH_ > {folder}/seen; echo 12",
    }
    for name, text in programs.items():
        path = folder / "programs" / name
        path.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{text}\n")
        path.chmod(0o755)


def test_a_second_job_for_a_busy_run_is_refused_and_the_shells_options_do_not_reach_sbatch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    slurm_that_knows(tmp_path, queued="")
    asked = ("--nodes", "4", "--time", "10")
    code, out, said = submit(capsys, tmp_path, *asked, dry=False)
    assert (code, out.split()[:2]) == (0, ["submitted", "12:"]), said
    assert (tmp_path / "seen").read_text() == ""
    assert "note: SBATCH_TIMELIMIT of this shell does not count" in said
    assert "#SBATCH --cpus-per-task=4" in (tmp_path / "run/slurm/job.sbatch").read_text()

    slurm_that_knows(tmp_path, queued="12")
    code, out, said = submit(capsys, tmp_path, *asked, dry=False)
    assert (code, out) == (PlatformError.exit_code, "")
    assert f"{tmp_path / 'run'} is the run of job 12, which is queued or runs; let it end, stop it (scancel 12)" in said
    assert submit(capsys, tmp_path, *asked, "--sbatch=--dependency=afterany:12", dry=False)[0] == 0
    assert submit(capsys, tmp_path, *asked, "--sbatch=--dependency=afterany:1", dry=False)[0] == PlatformError.exit_code


def test_paths_of_a_job_mean_in_the_job_what_they_meant_at_submission(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    site = tmp_path / "site.yaml"
    site.write_text(
        "container_mounts: ['~/a', '$SCRATCH:/b']\ncontainer_image: ~/i.sqsh\nenvironment: {HF_HOME: $SCRATCH/hf}\n"
    )
    script = submit(
        capsys, tmp_path, "--save=~/run", "--data-cache-path", "$SCRATCH/cache", *SIZE, "--time", "10", "--site",
        "~/site.yaml", save=False,
    )[1]  # fmt: skip
    for line in (f"run={tmp_path}/run", f"export SCRATCH={tmp_path}", f"export HOME={tmp_path}",
                 f"export HF_HOME={tmp_path}/hf"):  # fmt: skip
        assert line in script.splitlines()
    assert f"{tmp_path}/a:{tmp_path}/a,{tmp_path}:/b" in script
    assert f"--container-image={tmp_path}/i.sqsh" in script


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("container_image: ''", 'container_image= must be a path, not ""'),
        ("container_mounts: ['/a:']", 'container_mounts=/a: must be a path, not ""'),
        ("container_image: $NOPE/x", "container_image=$NOPE/x names $NOPE, which is not set here"),
        (
            "environment: {A: $NOPE}",
            "names $NOPE, which is not set here; set it, or write the path out; what only the job",
        ),
        ("qos: ''", 'qos= must be a name, not ""'),
        ("mem: 5 GB", "mem=5 GB must be a number with K, M, G or T after it, such as 64G"),
    ],
)
def test_paths_and_words_of_a_site_are_checked(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_site(str(path), {})
    assert error in str(raised.value)


def test_a_site_named_by_the_environment_is_named_so_in_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, error in (
        ("/no/site.yaml", "MEGALM_SITE=/no/site.yaml cannot be read"),
        ("$NOPE/x", "MEGALM_SITE=$NOPE/x names"),
    ):
        monkeypatch.setenv("MEGALM_SITE", value)
        code, _, said = submit(capsys, tmp_path, *SIZE, "--time", "10")
        assert code == 2
        assert error in said


@pytest.mark.parametrize(
    ("asked", "launcher", "expected"),
    [
        ("h100:4", "slurm", "#SBATCH --gpus-per-node=h100:4"),
        ("a100:2", "srun", "--gpus-per-node=a100:2 "),
        ("4", "slurm", "#SBATCH --gpus-per-node=4"),
        ("h100", "slurm", 'must be a number, or TYPE:NUMBER such as h100:4, not "h100"'),
        ("a100:4", "slurm", "--gpus-per-node a100:4 but the nodes of partition main have 2; ask for at most 2"),
        ("v100:4", "slurm", "the nodes of partition main have no v100; ask for those of a100 or h100, or for another"),
        (
            "h100:4",
            "torchrun",
            "names a type, which says nothing to --launcher torchrun, only to slurm and srun; give 4",
        ),
        ("h100:", "slurm", 'must be a number, or TYPE:NUMBER such as h100:4, not "h100:"'),
        ("-1", "slurm", "must be a number, or TYPE:NUMBER"),
        (":4", "slurm", "must be a number, or TYPE:NUMBER"),
    ],
)
def test_types_of_gpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: str, launcher: str, expected: str
) -> None:
    sinfo = tmp_path / "programs" / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'main*|2|64|1|1000000|1:00:00|gpu:h100:4(S:0-1),gpu:a100:2'\n")
    sinfo.chmod(0o755)
    limit = ("--time", "10") if launcher != "torchrun" else ()
    try:
        said = submit(capsys, tmp_path, f"--gpus-per-node={asked}", "--launcher", launcher, *limit)
    except SystemExit:  # the parser's own
        said = (2, "", capsys.readouterr().err)
    assert expected in said[1] + said[2]
    assert (said[0] == 0) == ("--gpus-per-node=" in expected)
