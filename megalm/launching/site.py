"""The site file: what holds on a cluster whatever is trained there (network, partition, modules, container)."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from megalm.config.base import Section
from megalm.config.merging.settings import rule
from megalm.config.merging.suggest import did_you_mean
from megalm.config.paths import PathText, read_path, read_variables
from megalm.errors import ConfigError
from megalm.secrets import is_secret
from megalm.shipped import shipped_hint
from megalm.storage.documents import DocumentError, parse_yaml, read_settings
from megalm.storage.faults import reason_of


def _read_mount(value: Any) -> Any:
    """HOST or HOST:INSIDE, each a path."""
    return ":".join(map(read_path, value.split(":"))) if isinstance(value, str) else value


def _read_value(value: Any) -> Any:
    """The value of a variable, which may name others."""
    if not isinstance(value, str):
        return value
    try:
        return read_path(value) if value.startswith("~/") else read_variables(value)
    except ValueError as error:
        raise ValueError(f"{error}; what only the job knows is set by a line of setup: (export NAME=...)") from None


def _read_word(value: Any) -> Any:
    """A word; YAML makes numbers of some."""
    if value == "":
        raise ValueError('must be a name, not ""; leave it out for the default')
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_lines(value: Any) -> Any:
    """Lines, given as one text or as a list of them."""
    is_list = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if is_list else value


def _read_memory(value: Any) -> Any:
    """An amount of memory as SLURM writes it."""
    if not re.fullmatch(r"\d+[KMGT]?", str(value), re.IGNORECASE):
        raise ValueError("must be a number with K, M, G or T after it, such as 64G; 0 is all of a node")
    return str(value)


Word = Annotated[str, BeforeValidator(_read_word)]
Memory = Annotated[str, BeforeValidator(_read_memory)]
Mount = Annotated[str, BeforeValidator(_read_mount)]


class Site(Section):
    """One cluster, from a YAML file (--site, or the variable MEGALM_SITE) and the command line."""

    partition: Word | None = None
    """Partition to submit to. Default: the cluster's."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that the nodes must have."""
    mem: Memory | None = None
    """Memory of each node, such as 64G; 0 is all. Default: all, or the share that belongs to the GPUs asked for."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, such as "--exclusive" or "--exclude=n7"."""
    environment: dict[str, Annotated[str, BeforeValidator(_read_value)]] = Field(default_factory=dict)
    """Variables of every rank: NCCL_*, UCX_*, GLOO_SOCKET_IFNAME, FI_*."""
    network_interface: Word | None = None
    """Network interface over which ranks talk: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""
    setup: Annotated[str, BeforeValidator(_read_lines)] = ""
    """Lines of a login shell at the start of the batch script, such as "module load cuda". One that fails ends the job,
    unless it ends with "|| true"."""
    container_image: PathText | None = None
    """Image in which the ranks run: for pyxis a name or .sqsh file, for apptainer a .sif file."""
    container_mounts: tuple[Mount, ...] = ()
    """Folders to mount, HOST or HOST:INSIDE; the working and the run folder are mounted anyway."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts the container: pyxis (srun --container-image, with enroot) or apptainer exec."""

    def variables(self) -> dict[str, str]:
        """The variables of every rank."""
        chosen = self.network_interface
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return (dict.fromkeys(names, chosen) if chosen else {}) | self.environment


def read_site(path: str | None, given: dict[str, Any], named_by: str = "--site ") -> Site:
    """The site of a file, which `named_by` names, with what the command line gives over it.

    Raises:
        ConfigError: the file is missing or not YAML, or holds something that is no setting of a site.
    """
    values = _parse(path, named_by + path) if path else {}
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
        return Site.model_validate(values | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(
            [f"{_origin(str(e['loc'][0]), path, given)}={e['input']} {rule(e['msg'])}" for e in error.errors()]
        ) from None


def _parse(path: str, named: str) -> dict[str, Any]:
    try:
        _, content = parse_yaml(read_settings(path))
    except OSError as error:
        raise ConfigError(
            f"{named} cannot be read: {reason_of(error, path)}; correct the path{shipped_hint(path)}"
        ) from None
    except DocumentError as error:
        raise ConfigError(f"{named}{f', line {error.line}' if error.line else ''}: {error}") from None
    if not isinstance(content, dict | None) or not all(isinstance(name, str) for name in content or {}):
        raise ConfigError(f"{named} must hold settings, one a line, such as partition: gpu")
    return content or {}


def _origin(name: str, path: str | None, given: dict[str, Any]) -> str:
    """A setting as it was given: by a flag, or by the file."""
    return "--" + name.replace("_", "-") if given.get(name) is not None else f"{path}: {name}"


def _text(value: Any) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
