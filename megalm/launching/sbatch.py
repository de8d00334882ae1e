"""The options of sbatch that `megalm submit` does not have: which the script decides, and how to give the others."""

from collections.abc import Sequence

from megalm.errors import ConfigError

_OF_THE_SCRIPT = {
    "nodes": "give --nodes",
    "ntasks": "give --nodes and --ntasks-per-node",
    "ntasks-per-node": "give --ntasks-per-node",
    "gpus": "give --nodes and --gpus-per-node",
    "gpus-per-node": "give --gpus-per-node",
    "gpus-per-task": "give --gpus-per-node; a rank takes the GPU of its number on the node",
    "cpus-per-task": "give --cpus-per-task",
    "time": "give --time",
    "partition": "give --partition",
    "job-name": "give --job-name",
    "array": "give --sweep FLAG=V1,V2",
    "signal": "give --signal-before",
    "requeue": "the job queues again unless --no-requeue is given",
    "no-requeue": "give --no-requeue",
    "open-mode": "a log is always appended to",
    "output": "the logs are in the run folder, under slurm/",
    "error": "the logs are in the run folder, under slurm/",
    "chdir": "submit from the folder in which the job is to run",
    "export": "put variables under environment: of a site file",
    "export-file": "put variables under environment: of a site file",
    "wrap": "the job runs the training script; name another with --script",
    "parsable": "the numbers of the jobs are printed after \"submitted\"",
    "test-only": "give --dry-run",
}  # fmt: skip
"""Options of sbatch about which the script of megalm decides: how to tell it."""
_OF_SBATCH = """
    acctg-freq bb bbf begin cluster-constraint clusters comment container container-id contiguous core-spec
    cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot dependency distribution exclude exclusive extra
    extra-node-info get-user-env gid gpu-bind gpu-freq gpus-per-socket gres gres-flags hint hold ignore-pbs input
    kill-on-invalid-dep licenses mail-type mail-user mcs-label mem-bind mem-per-cpu mem-per-gpu mincpus network nice
    no-kill nodefile nodelist ntasks-per-core ntasks-per-gpu ntasks-per-socket oom-kill-step overcommit oversubscribe
    power prefer priority propagate quiet reboot reservation resv-ports segment sockets-per-node spread-job stepmgr
    switches thread-spec threads-per-core tmp tres-bind tres-per-task uid use-min-nodes verbose wait wait-all-nodes
    wckey
"""
"""The other options of sbatch (SLURM 25.05), which go into the script as they are."""
_LETTERS = {
    "N": "nodes", "n": "ntasks", "G": "gpus", "c": "cpus-per-task", "t": "time", "J": "job-name", "a": "array",
    "o": "output", "e": "error", "D": "chdir", "H": "hold", "d": "dependency", "w": "nodelist", "x": "exclude",
    "M": "clusters", "L": "licenses", "m": "distribution", "F": "nodefile", "b": "begin", "s": "oversubscribe",
    "O": "overcommit", "k": "no-kill", "Q": "quiet", "v": "verbose", "W": "wait", "B": "extra-node-info",
    "S": "core-spec", "p": "partition", "A": "account", "C": "constraint", "q": "qos", "i": "input",
}  # fmt: skip
"""The short names of sbatch's options."""


def sbatch_hint(word: str) -> str | None:
    """How to give submit an option of sbatch that it does not have; None: sbatch has no such option."""
    name, value = sbatch_option(word)
    if name in _OF_THE_SCRIPT:
        return f"{word} is an option of sbatch about which the script decides; {_OF_THE_SCRIPT[name]}"
    if name in _OF_SBATCH.split():
        return f"{word} is an option of sbatch; hand it on: --sbatch=--{name}{value}"
    return None


def check_sbatch(options: Sequence[str]) -> None:
    """`--sbatch` and `sbatch:` say nothing about which the script decides, and each is one option.

    Raises:
        ConfigError: what is wrong with them.
    """
    problems = []
    for option in options:
        name = sbatch_option(option)[0]
        if not option.startswith("-") or "\n" in option:
            problems.append(f"sbatch: {option!r} must be one option, such as --exclusive or --exclude=n7")
        elif name in _OF_THE_SCRIPT:
            problems.append(f"--sbatch={option}: the script decides about --{name}; {_OF_THE_SCRIPT[name]}")
    if problems:
        raise ConfigError(problems)


def sbatch_option(word: str) -> tuple[str, str]:
    """The long name of an option of sbatch and its "=value": ("exclude", "=n7") of --exclude=n7, -x n7 or -xn7."""
    if not word.startswith("--"):
        name, value = _LETTERS.get(word[1:2], ""), word[2:].strip()
        return name, f"={value}" if value else ""
    name, _, value = word[2:].replace(" ", "=", 1).partition("=")
    return name, f"={value}" if value else ""
