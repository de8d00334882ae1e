"""kill -9 at any moment, then the same command: the bytes of a run that nobody disturbed."""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

MOMENTS = int(os.environ.get("MEGALM_TEST_KILLS", "8"))
"""How many runs are killed and started again, over all parameters together."""
SERVER = """
import os, sys
from megalm.data.text import formats
from megalm.data.preprocess import shuffle, units
from megalm.data.preprocess.filters import dedup
formats.CHUNK_BYTES, units.MIN_UNIT_BYTES = 4096, 1 << 15
shuffle.BUCKET_BYTES, dedup.PARTITION_BYTES = 1 << 16, 1 << 12
from megalm.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # the summary
        os._exit(main(line.rstrip("\\n").split("\\t")))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Runs each line of its input as a command of megalm in its own process, on small units; Python starts once."""
FLAGS = "--tokenizer-type ByteLevelTokenizer --append-eod --json-keys text title --on-error report"
VARIANTS = {
    "plain": ("a.jsonl b.jsonl.gz", ""),
    "dedup and shuffle": ("a.jsonl b.jsonl.gz", "--dedup exact --shuffle"),
    "all kinds of files": ("d.parquet c.jsonl.zst b.jsonl.gz a.jsonl e.txt", "--dedup exact --clean --min-chars 20"),
    "sentences": ("f.jsonl.gz", "--split-sentences --shuffle"),
}


RARE = ("sentences", "plain", "dedup and shuffle")
"""What the others do too."""


class Commands:
    """Commands of megalm that run one at a time."""

    def __init__(self) -> None:
        server = [sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(
            server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def start(self, *words: str) -> int:
        """The process of a command."""
        assert self._server.stdin is not None
        self._server.stdin.write("\t".join(words) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit code of the command, negative for a signal."""
        return self._answer()

    def _answer(self) -> int:
        stream: IO[str] | None = self._server.stdout
        assert stream is not None
        return int(stream.readline())

    def close(self) -> None:
        """Ends the process that runs them."""
        self._server.kill()
        self._server.communicate()


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in files of every kind; one line of each of the JSON files is none."""
    folder, draw, documents = tmp_path_factory.mktemp("inputs"), random.Random(1), 3_000
    numbers = [draw.randrange(documents) for _ in range(documents)]
    texts = [(f"Text {number}. " * (number % 40), f"title {number}") for number in numbers]
    lines = [json.dumps({"text": text, "title": title}) for text, title in texts]
    lines[documents // 2] = "no JSON"
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:600] + lines[documents // 2 :][:200]).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(sorted(lines)).encode()))
    table = pa.table({"text": [text for text, _ in texts], "title": [title for _, title in texts]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=700)
    (folder / "d.parquet").write_bytes(buffer.getvalue())
    (folder / "e.txt").write_text("\n\n".join(text for text, _ in texts))
    return folder


def datasets(folder: Path, prefix: str) -> dict[str, bytes]:
    """The content of all that was made; "inputs" of a manifest are the same, its path too."""
    return {p.name.removeprefix(prefix): p.read_bytes() for p in folder.iterdir() if p.name.startswith(prefix)}


def remove(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "variant", ["all kinds of files", *(pytest.param(name, marks=pytest.mark.long) for name in RARE)]
)
def test_after_each_kill_the_same_command_ends_in_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, inputs: Path, commands: Commands, variant: str
) -> None:
    names, flags = VARIANTS[variant]
    files = [str(inputs / name) for name in names.split()]
    draw = random.Random()

    def command(prefix: str, workers: int) -> list[str]:
        given = ["preprocess", "--input", *files, "--output-prefix", str(tmp_path / prefix)]
        return [*given, *FLAGS.split(), *flags.split(), f"--workers={workers}"]

    start = time.monotonic()
    commands.start(*command("whole", 2))
    assert commands.wait() == 0
    whole_s = time.monotonic() - start
    whole = datasets(tmp_path, "whole")
    assert len(whole) == 7  # .bin, .idx and manifest of each key, and the rejected lines
    kills = 0
    while kills < -(-MOMENTS // len(VARIANTS)):
        process = commands.start(*command("killed", draw.randint(1, 3)))
        time.sleep(draw.uniform(0, 1) * whole_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if commands.wait() != -signal.SIGKILL:  # it was faster: begin anew
            remove(tmp_path, "killed")
            whole_s *= 0.7  # the machine was busier when it was measured
            continue
        kills += 1
        final = {path.name for path in tmp_path.glob("killed_*") if not path.name.endswith(".partial")}
        assert all(name.replace(".idx", ".bin") in final for name in final)  # .idx is the last of the two
        if draw.random() < 0.3:
            continue  # the run that goes on is killed too
        commands.start(*command("killed", draw.randint(1, 3)))
        assert commands.wait() == 0
        assert datasets(tmp_path, "killed") == whole
        remove(tmp_path, "killed")
    commands.start(*command("killed", 2))
    assert commands.wait() == 0
    assert datasets(tmp_path, "killed") == whole
