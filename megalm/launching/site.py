"""The site file: what holds on a cluster whatever is trained there (network, partition, modules, container)."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationError

from megalm.config.base import Section
from megalm.config.merging.suggest import did_you_mean
from megalm.errors import ConfigError
from megalm.secrets import is_secret
from megalm.shipped import shipped_hint
from megalm.storage.documents import DocumentError, parse_yaml, read_settings
from megalm.storage.faults import reason_of


class Site(Section):
    """One cluster, from a YAML file (--site, or the variable MEGALM_SITE) and the command line."""

    partition: str | None = None
    """Partition to submit to. Default: the cluster's."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, such as "--exclusive"."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every rank: NCCL_*, UCX_*, GLOO_SOCKET_IFNAME, FI_*."""
    network_interface: str | None = None
    """Network interface over which ranks talk: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""
    setup: str = ""
    """Shell lines at the start of the batch script, such as "module load cuda"."""
    container_image: str | None = None
    """Image in which the ranks run: for pyxis a name or .sqsh file, for apptainer a .sif file."""
    container_mounts: tuple[str, ...] = ()
    """Folders to mount, HOST or HOST:INSIDE; the working and the run folder are mounted anyway."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts the container: pyxis (srun --container-image, with enroot) or apptainer exec."""

    def variables(self) -> dict[str, str]:
        """The variables of every rank."""
        chosen = self.network_interface
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return (dict.fromkeys(names, chosen) if chosen else {}) | self.environment


def read_site(path: str | None, given: dict[str, Any]) -> Site:
    """The site of a file, with what the command line gives over it.

    Raises:
        ConfigError: the file is missing or not YAML, or holds something that is no setting of a site.
    """
    values = _parse(path) if path else {}
    unknown = [name for name in values if name not in Site.model_fields]
    problems = [f"{path}: unknown key {name}{did_you_mean(str(name), Site.model_fields)}" for name in unknown]
    environment = values.get("environment")
    if isinstance(environment, dict):
        values["environment"] = {str(name): _text(value) for name, value in environment.items()}
        bad = [name for name in values["environment"] if not re.fullmatch(r"[A-Za-z_]\w*", name)]
        problems += [f"{path}: environment: {name!r} is no name of a variable" for name in bad]
        problems += [
            f"{path}: environment: {name} looks like a secret, and the batch script and ps would show it; let setup "
            "read it from a file that is yours alone"
            for name, value in values["environment"].items()
            if is_secret(name, value)
        ]
    if problems:
        raise ConfigError(problems)
    try:
        return Site.model_validate(values | {name: value for name, value in given.items() if value})
    except ValidationError as error:
        raise ConfigError(
            [f"{path or 'command line'}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        ) from None


def _parse(path: str) -> dict[str, Any]:
    try:
        _, content = parse_yaml(read_settings(path))
    except OSError as error:
        raise ConfigError(
            f"--site {path} cannot be read: {reason_of(error, path)}; correct the path{shipped_hint(path)}"
        ) from None
    except DocumentError as error:
        source = f"{path}:{error.line}" if error.line else path
        raise ConfigError(f"--site {source}: {error}") from None
    if not isinstance(content, dict | None) or not all(isinstance(name, str) for name in content or {}):
        raise ConfigError(f"--site {path} must hold settings, one a line, such as partition: gpu")
    return content or {}


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
