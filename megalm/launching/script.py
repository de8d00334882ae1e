"""The batch script of a job, complete and readable: it can be edited and submitted by hand."""

import re
import shlex

from megalm.errors import ConfigError, PlatformError
from megalm.launching.job import EXIT_NO_PROGRESS, Job

_HEAD = """\
#!/bin/bash{login}
# Written by: {command}
# It can be edited and submitted again: sbatch {path}
{directives}

{environment}
set +e +o pipefail -u
{choose}
flags=({flags})
restart=${{SLURM_RESTART_COUNT:-0}}
logs=$run/slurm/job_$SLURM_JOB_ID.$restart
starts=$run/slurm/starts
mkdir -p "$run/slurm"
"""

_SETUP = """\
# The site's setup, in a login shell as its user has it. A line that fails ends the job; "|| true" lets it pass.
setup_failed() {{
    [ "${{#BASH_SOURCE[@]}}" -eq 2 ] || return 0  # inside of a file or function of the user's
    local lines
    mapfile -t lines < "$0"
    echo "error: setup: of the site failed (exit code $1): ${{lines[BASH_LINENO[0] - 1]}}" >&2
    exit {failed}
}}
trap 'setup_failed $?' ERR
{setup}
trap - ERR
"""

_PROGRESS = """
# A job that starts again and again without a new checkpoint is broken: it is stopped.
{forget}latest=$(cat "$run/latest" 2>/dev/null || echo none)
echo "$latest" >> "$starts"
if [ "$(tail -n {window} "$starts" | grep -cxF -- "$latest")" -eq {window} ]; then
    echo "error: {idle} starts in a row made no progress (checkpoint: $latest); see $run/slurm for why," >&2
    echo "  mend it, and submit again" >&2
    exit {no_progress}
fi
"""

_START = """
say() {{ echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"; }}
say "start $restart (SLURM_RESTART_COUNT), checkpoint $latest, $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST"
say "the logs of the ranks are $logs.rank_*.log"
{fresh}srun {srun} \\
    {rank} "${{flags[@]}}" --save "$run" 2>"$logs.srun.log" &
ranks=$!
tail --quiet --pid "$ranks" --lines +1 -F "$logs.srun.log" "$logs.rank_0.log" 2>/dev/null &
shown=$!

# SIGUSR1 (the warning before the time limit) goes to the ranks, which save and exit with 75. SIGTERM means that SLURM
# ends this job and tells the ranks too (scancel, preemption, scontrol requeue): what follows is SLURM's to decide.
ended=
trap 'ended=1' TERM
trap 'kill -USR1 "$ranks"' USR1
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
wait "$ranks"
code=$?
wait "$shown"
# srun tells the largest code, which may be that of a rank that it ended; the first to fail is the cause (128 and the
# number of the signal if it was killed: then that is the largest)
first=$(sed -n 's/^srun: error: .*: tasks\\? [0-9,-]*: //p' "$logs.srun.log" | head -n 1)
case $first in "Exited with exit code "*) code=${{first##* }} ;; esac
"""

_END = """
if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then
    for log in "$logs".rank_*.log; do
        [ "$log" = "$logs.rank_0.log" ] || grep -m 1 -E '^(error|rank [0-9]+ failed)' "$log"
    done | sort -u | head -n 8 >&2
fi
# 138: SIGUSR1 came before Python could take note of it
if [ -z "$ended" ] && {{ [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; }}; then
{again}
fi
say "end with exit code $code, checkpoint $(cat "$run/latest" 2>/dev/null || echo none)"
exit "$code"
"""


def batch_script(job: Job, path: str) -> str:
    """The text of the batch script that will lie at `path`."""
    directives = "\n".join(f"#SBATCH {option}" for option in _options(job))
    forget = '[ "$restart" -gt 0 ] || rm -f "$starts"\n' if not job.chained else ""
    fresh = '[ "$restart" -gt 0 ] || flags+=(--fresh)\n' if job.fresh else ""
    return (
        _HEAD.format(
            login=" -l" if job.site.setup.strip() else "",
            command=job.command.replace("\n", "\n# "),
            path=shlex.quote(path),
            directives=directives,
            environment=_environment(job),
            choose=_choose(job),
            flags="\n    " + "\n    ".join(_lines(job.flags)) + "\n" if job.flags else "",
        )
        + (_extra_flags(job))
        + _PROGRESS.format(
            forget=forget, window=job.idle_starts + 1, idle=job.idle_starts, no_progress=EXIT_NO_PROGRESS
        )
        + _START.format(fresh=fresh, srun=" ".join(srun_options(job)), rank=_rank_command(job))
        + _END.format(again=_again(job))
    )


def _options(job: Job) -> list[str]:
    """The options of sbatch."""
    site, array = job.site, len(job.elements) > 1
    log = "job_%A_%a.log" if array else "job_%j.log"
    limit = f"%{job.array_limit}" if job.array_limit else ""
    optional = {
        "time": job.time,
        "gpus-per-node": job.gpus_asked or None,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.mem,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "array": f"0-{len(job.elements) - 1}{limit}" if array else None,
    }
    return [
        f"--job-name={_directive(job.name)}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        *(f"--{name}={_directive(str(value))}" for name, value in optional.items() if value is not None),
        f"--signal=USR1@{job.signal_before_s}",
        "--requeue" if job.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={_directive(f'{_pattern(str(job.folder))}/slurm/{log}')}",
        f"--chdir={_directive(str(job.directory))}",
        "--export=NIL",
        *site.sbatch,
    ]


def _directive(text: str) -> str:
    """A value in an #SBATCH line, which has its own rules: only double quotes keep blanks, a backslash the rest.

    Raises:
        ConfigError: a line break, which no quotes keep.
    """
    if "\n" in text or "\r" in text:
        raise ConfigError(f"{text!r} has a line break, which SLURM cannot take; choose another name")
    return '"' + re.sub(r'(["\\#])', r"\\\1", text) + '"' if re.search(r"[\s\"'\\#]", text) else text


def _pattern(path: str) -> str:
    """A path in a name of SLURM's logs, where %j is the job's number.

    Raises:
        ConfigError: a backslash, which turns the numbers off and is lost.
    """
    if "\\" in path:
        raise ConfigError(f"--save {path} has a backslash, which SLURM cannot have in names of logs; choose another")
    return path.replace("%", "%%")


def _environment(job: Job) -> str:
    """The environment of the ranks: that of the submission, as far as it matters and is no secret, then the site's."""
    lines = ["# the environment of the submission, without secrets: the job gets no other"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    if job.site.variables():
        lines.append("# the site's")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in job.site.variables().items()]
    setup = (
        _SETUP.format(setup=job.site.setup.strip(), failed=PlatformError.exit_code) if job.site.setup.strip() else ""
    )
    return "\n".join(lines) + "\n" + setup


def _choose(job: Job) -> str:
    """The run folder: the job's, or that of the element of the array."""
    if len(job.elements) == 1:
        return f"run={shlex.quote(str(job.elements[0].run))}"
    cases = [
        f"    {number}) run={shlex.quote(str(element.run))} varied=({shlex.join(element.flags)}) ;;"
        for number, element in enumerate(job.elements)
    ]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


def _extra_flags(job: Job) -> str:
    if len(job.elements) > 1:
        return 'flags+=("${varied[@]}")\n'
    return f"flags+=({shlex.join(job.elements[0].flags)})\n" if job.elements[0].flags else ""


def srun_options(job: Job) -> list[str]:
    """The options of srun inside the script; the number of ranks is the job's."""
    options = ["--kill-on-bad-exit=1", "--export=ALL", '--output="${logs//%/%%}.rank_%t.log"']
    if job.cpus_per_task:
        options.append(f"--cpus-per-task={job.cpus_per_task}")  # since SLURM 22.05 srun does not take it from sbatch
    site = job.site
    if site.container_image and site.container_runtime == "pyxis":
        mounts = ",".join(f"{mount}:{mount}" if ":" not in mount else mount for mount in _mounts(job))
        options.append(f"--container-image={shlex.quote(site.container_image)}")
        options.append(f'--container-mounts={shlex.quote(mounts)},"$run:$run"')
        options.append(f"--container-workdir={shlex.quote(str(job.directory))}")
    return options


def _rank_command(job: Job) -> str:
    """What one task runs, before the flags."""
    command = shlex.join([job.python, "-u", *job.training_script()])
    site = job.site
    if site.container_image and site.container_runtime == "apptainer":
        binds = shlex.quote(",".join(_mounts(job)))
        gpus = "--nv " if job.gpus_per_node else ""
        image = shlex.quote(site.container_image)
        return f'apptainer exec {gpus}--pwd "$PWD" --bind {binds},"$run" {image} {command}'
    return command


def _mounts(job: Job) -> list[str]:
    return [str(job.directory), *job.site.container_mounts]


def _again(job: Job) -> str:
    """What follows after the ranks saved and stopped."""
    if job.chained:
        return '    say "saved and stopped; the next job of the chain continues"'
    if not job.requeue:
        return '    say "saved and stopped; submit the same script to continue"'
    return (
        '    say "saved and stopped; the job queues again"\n'
        '    scontrol requeue "$SLURM_JOB_ID" || say "not queued again; submit the same script to continue"'
    )


def _lines(flags: tuple[str, ...]) -> list[str]:
    """The flags, each with its values on a line."""
    lines: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]
