"""What the system refuses becomes the right error, whoever reads or writes: a table of operations x errors."""

import builtins
import errno
import io
import json
import os
import resource
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.checkpoint import run_folder
from megalm.checkpoint.format import Manifest, find_checkpoint
from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.indexed.manifest import read_manifest
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.preprocess import parts
from megalm.data.samples.index_cache import IndexCache
from megalm.data.text.formats import Reading
from megalm.data.text.input_file import InputFile
from megalm.data.text.inputs import expand
from megalm.data.tokenizers import build_tokenizer
from megalm.errors import CheckpointError, ConfigError, DataError, MegalmError, PlatformError
from megalm.launching import submit
from megalm.launching.commands import read_hostfile
from megalm.launching.site import read_site
from megalm.storage import faults
from megalm.storage.atomic import atomic_write

ERRORS = (
    "ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EIO", "ENAMETOOLONG", "EMFILE",
    "ENFILE", "ESTALE", "ELOOP", "ENODEV", "EREMOTEIO",
)  # fmt: skip


@contextmanager
def refusing(number: int, name: str, *, changes: bool) -> Iterator[None]:
    """The system refuses to read what has `name` in its path; or, with `changes`, to write, make or rename it."""

    def refuse(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and name in os.fspath(path):
            raise OSError(number, os.strerror(number), os.fspath(path))

    def opening(original: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if not changes or writes(*arguments, **options):
                refuse(path)
            return original(path, *arguments, **options)

        return call

    def mode_writes(mode: str = "r", *_: Any, **__: Any) -> bool:
        return mode[0] != "r" or "+" in mode

    def flags_write(flags: int = 0, *_: Any, **__: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    patch = pytest.MonkeyPatch()
    opened = opening(builtins.open, mode_writes)
    for module in (builtins, io):
        patch.setattr(module, "open", opened)
    patch.setattr(os, "open", opening(os.open, flags_write))
    for call in ("mkdir", "rename", "replace") if changes else ("scandir", "listdir"):
        patch.setattr(os, call, opening(getattr(os, call), lambda *_, **__: True))
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something of every kind to read, each under a name with "asked" in it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "asked.yaml").write_text("model: {num_layers: 2}\n")
    (folder / "asked.json").write_text("{}")
    (folder / "asked.hosts").write_text("node1 slots=8\n")
    (folder / "asked.model").write_text("x")
    (folder / "asked.jsonl").write_text('{"text": "a"}\n')
    (folder / "asked").mkdir()
    (folder / "asked" / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "asked_checkpoint").mkdir()
    (folder / "asked_checkpoint" / "manifest.json").write_text("{}")
    (folder / "run_asked").mkdir()
    (folder / "run_asked" / "latest").write_text("step_2\n")
    with IndexedDatasetBuilder(folder / "asked_data", np.int32) as builder:
        builder.add_document([1, 2, 3])
        builder.finalize()
    (folder / "asked_data.manifest.json").write_text("{}")
    return folder


READERS: dict[str, tuple[type[MegalmError], Callable[[Path], Any]]] = {
    "recipe": (ConfigError, lambda folder: load_config(["--config", f"{folder}/asked.yaml"])),
    "DeepSpeed JSON": (ConfigError, lambda folder: load_config(["--deepspeed_config", f"{folder}/asked.json"])),
    "site": (ConfigError, lambda folder: read_site(f"{folder}/asked.yaml", {})),
    "hostfile": (ConfigError, lambda folder: read_hostfile(folder / "asked.hosts")),
    "run folder": (CheckpointError, lambda folder: find_checkpoint(folder / "run_asked")),
    "manifest": (CheckpointError, lambda folder: Manifest.read(folder / "asked_checkpoint")),
    "tokenizer": (
        DataError,
        lambda folder: build_tokenizer(
            TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=f"{folder}/asked.model")
        ),
    ),
    "indexed dataset": (DataError, lambda folder: IndexedDataset(folder / "asked_data")),
    "its manifest": (DataError, lambda folder: read_manifest(folder / "asked_data.manifest.json")),
    "input": (DataError, lambda folder: list(InputFile(f"{folder}/asked.jsonl").chunks(Reading()))),
    "folder of input": (DataError, lambda folder: expand([f"{folder}/asked"])),
}


def write_index(folder: Path, size: int = 3) -> None:
    with IndexedDatasetBuilder(folder / "asked_out", np.int32, overwrite=True) as builder:
        builder.add_document(np.zeros(size, np.int32))
        builder.finalize()


def write_atomic(folder: Path) -> None:
    with atomic_write(folder / "asked.out") as stream:
        stream.write(b"x")


def write_parts(folder: Path) -> None:
    with parts.locked_parts(Namespace(parts=folder / "asked.parts")):  # type: ignore[arg-type]
        pass


def write_script(folder: Path) -> None:
    submit._write(Namespace(elements=()), folder / "asked" / "slurm" / "job.sbatch", "#")  # type: ignore[arg-type]


WRITERS: dict[str, tuple[type[MegalmError], Callable[[Path], Any]]] = {
    "new run folder": (CheckpointError, lambda folder: run_folder.prepare_run_folder(folder / "asked" / "run")),
    "lock": (CheckpointError, lambda folder: run_folder.lock_run_folder(folder / "asked").close()),
    "config.yaml": (CheckpointError, lambda folder: run_folder.write_config(folder / "asked", "x")),
    "dataset": (DataError, write_index),
    "atomic": (DataError, write_atomic),
    "index cache": (DataError, lambda folder: IndexCache(folder / "asked" / "c").get({}, lambda: {"a": np.arange(3)})),
    "parts": (DataError, write_parts),
    "batch script": (PlatformError, write_script),
}


@pytest.mark.parametrize("operation", [*READERS, *WRITERS])
def test_every_refusal_is_told_with_path_and_reason(files: Path, operation: str) -> None:
    kind, act = (READERS | WRITERS)[operation]
    for name in ERRORS:
        number = getattr(errno, name)
        with refusing(number, "asked", changes=operation in WRITERS), pytest.raises(kind) as caught:
            act(files)
        text = str(caught.value)
        assert os.strerror(number) in text, (name, text)
        assert "asked" in text, (name, text)
        assert "damaged" not in text, (name, text)
        assert "holds no" not in text, (name, text)
        assert caught.value.exit_code == kind.exit_code
    if operation in WRITERS:  # and leaves nothing behind
        act(files)


def test_reasons_tell_what_can_be_seen(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for number, path, said in (
        (errno.ENOSPC, tmp_path / "none" / "x", f"MB are free in {tmp_path}"),
        (errno.EACCES, tmp_path / "file", f"{tmp_path / 'file'} belongs to "),
        (errno.EACCES, tmp_path / "new", f"{tmp_path} belongs to "),
        (errno.EPERM, tmp_path / "file", "lsattr"),
        (errno.ENOENT, tmp_path / "link", f"it is a link to {tmp_path / 'nothing'}, which does not exist"),
        (errno.ENOENT, tmp_path / "none" / "deeper" / "x", f"there is no folder {tmp_path / 'none'}"),
        (errno.ENOTDIR, tmp_path / "file" / "x", f"{tmp_path / 'file'} is no folder"),
        (errno.ELOOP, tmp_path / "link", "symbolic link"),
        (errno.EMFILE, tmp_path, "ulimit -n allows"),
        (errno.EIO, tmp_path, "dmesg"),
    ):
        assert said in faults.reason_of(OSError(number, "x"), path)


def test_what_libraries_say_in_words_is_understood(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    told = r"cannot write .*x: No space left on device \(.* MB are free.*\); free some"
    with pytest.raises(DataError, match=told), faults.writing(tmp_path / "x", DataError, "free some"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(KeyError), faults.writing(tmp_path / "x", DataError, "free some"):
        raise KeyError("nothing of the system's")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who becomes somebody else")
def test_a_closed_folder_is_told_with_its_owner(files: Path) -> None:
    nobody = 65534
    for operation in ("recipe", "run folder", "tokenizer", "indexed dataset", "input", "new run folder", "dataset"):
        kind, act = (READERS | WRITERS)[operation]
        os.seteuid(nobody)
        try:
            with pytest.raises(
                kind, match=r"Permission denied \(/\S* belongs to root with mode d\S*, this process runs"
            ):
                act(files)
        finally:
            os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    run_folder.prepare_run_folder(small_disk / "run")
    with pytest.raises(DataError, match=r"No space left on device \(0\.0 MB are free in .*nothing was published"):
        write_index(small_disk, 100_000)
    assert [path.name for path in small_disk.iterdir()] == ["run"]
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler"], capture_output=True)
    with pytest.raises(CheckpointError, match=rf"cannot write {small_disk}/new: No space left on device"):
        run_folder.prepare_run_folder(small_disk / "new")


def test_ulimit_is_named_and_not_the_free_space(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"File too large \(ulimit -f allows 0\.2 MB a file\)"):
            write_index(tmp_path, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_json_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "asked.manifest.json"
    path.write_text(json.dumps({}))
    with refusing(errno.EIO, "asked", changes=False), pytest.raises(DataError, match="Input/output error"):
        read_manifest(path)
