"""What looks like a secret reaches no batch script, no log and no run folder; what is no secret does."""

import argparse
import stat
from pathlib import Path

import pytest

from megalm.config.merging.load import load_config
from megalm.distributed.environment import captured_environment
from megalm.errors import ConfigError
from megalm.launching import submit
from megalm.launching.site import read_site
from megalm.secrets import is_secret, masked

SECRETS = {
    "HF_PAT": "x", "NCCL_PW": "x", "UCX_PWD": "x", "HF_TOKEN": "x", "HF_HUB_TOKEN": "x", "WANDB_API_KEY": "x",
    "HF_ENDPOINT": "https://token@host", "NCCL_NET": "ftp://a:b@c", "MEGALM_SITE": "https://h/f?token=abc",
    "HF_HOME": "hf_" + "a" * 34, "FI_PROVIDER": "ghp_" + "b" * 36, "TORCH_LOGS": "AKIA" + "C" * 16,
    "DS_BUILD_JWT": "x", "GLOO_SOCKET_AUTH": "x", "TRITON_COOKIE": "x",
}  # fmt: skip
"""Each looks like one, by its name or its value."""
OWN = {"HF_MINE": "x", "NCCL_OF_US": "x", "DS_NOTES": "x", "MEGALM_X": "x", "UNRELATED": "x"}
"""People's own variables under known prefixes."""
NEEDED = {
    "PATH": "/bin", "HF_HOME": "/a", "HF_HUB_OFFLINE": "1", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_HCA": "mlx5",
    "NCCL_DEBUG": "INFO", "UCX_TLS": "rc", "FI_PROVIDER": "efa", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
    "MEGALM_SITE": "/etc/site.yaml", "TORCH_LOGS": "+dynamo", "HF_ENDPOINT": "https://mirror/x",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SECRETS, *OWN])
def test_it_is_not_captured(name: str) -> None:
    assert captured_environment({name: (SECRETS | OWN)[name]}) == {}


def test_what_a_job_needs_is_captured() -> None:
    assert captured_environment(NEEDED) == NEEDED


@pytest.mark.parametrize("name", SECRETS)
def test_a_site_file_cannot_spread_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "site.yaml").write_text(f"environment: {{{name}: '{SECRETS[name]}'}}")
    with pytest.raises(ConfigError, match=f"environment: {name} looks like a secret") as caught:
        read_site(str(tmp_path / "site.yaml"), {})
    assert SECRETS[name] == "x" or SECRETS[name] not in str(caught.value)


def test_a_setting_cannot_hold_it() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_model .* holds what looks like a secret") as caught:
        load_config(["--tokenizer-model", "https://me:canary@host/x", "--mock-data"])
    assert "canary" not in str(caught.value)


def test_texts_are_masked() -> None:
    assert masked("--x https://me:pass@host/a ftp://tok@h https://h/?token=abc&n=1") == (
        "--x https://***@host/a ftp://***@h https://h/?***&n=1"
    )
    assert masked("https://host/a@b mail@host") == "https://host/a@b mail@host"
    assert not is_secret("TOKENIZERS_PARALLELISM", "true")
    assert not is_secret("PATH", "/usr/bin")


def test_a_batch_script_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "job.sbatch"
    submit._write(argparse.Namespace(elements=()), path, "#!/bin/bash\n")  # type: ignore[arg-type]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
