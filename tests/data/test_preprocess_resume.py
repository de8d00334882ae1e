"""kill -9 at any moment, then the same command: the bytes of a run that nobody disturbed."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOMENTS = int(os.environ.get("MEGALM_TEST_KILLS", "2"))
"""How often the run is killed before it may end."""
SMALL_UNITS = """
import sys
from megalm.data import readers
from megalm.data.preprocess import dedup, shuffle, units
readers.CHUNK_BYTES, units.MIN_UNIT_BYTES = 4096, 1 << 15
shuffle.BUCKET_BYTES, dedup.PARTITION_BYTES = 1 << 16, 1 << 12
from megalm.cli import main
sys.exit(main(sys.argv[1:]))
"""
FLAGS = "--tokenizer-type ByteLevelTokenizer --append-eod --json-keys text title --on-error report"


def command(folder: Path, prefix: str, flags: str, workers: int = 2) -> list[str]:
    inputs = [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz")]
    output = ["--output-prefix", str(folder / prefix)]
    return [
        sys.executable,
        "-c",
        SMALL_UNITS,
        "preprocess",
        "--input",
        *inputs,
        *output,
        *FLAGS.split(),
        *flags.split(),
        f"--workers={workers}",
    ]


def make_input(folder: Path, documents: int) -> None:
    draw = random.Random(1)
    lines = []
    for _ in range(documents):
        number = draw.randrange(documents)
        lines.append(json.dumps({"text": f"text {number} " * (number % 40), "title": f"title {number}"}))
    lines[documents // 2] = "no JSON"
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))


def datasets(folder: Path, prefix: str) -> dict[str, bytes]:
    """The content of what was made; "inputs" of a manifest are the same, its path too."""
    return {p.name.removeprefix(prefix): p.read_bytes() for p in folder.iterdir() if p.name.startswith(prefix)}


@pytest.mark.parametrize("flags", ["", "--dedup exact --shuffle"])
def test_killed_runs_end_in_the_bytes_of_an_undisturbed_one(tmp_path: Path, flags: str) -> None:
    make_input(tmp_path, 12_000)
    start = time.monotonic()
    subprocess.run(command(tmp_path, "whole", flags), check=True, timeout=120, stdout=subprocess.DEVNULL)
    whole_s = time.monotonic() - start
    draw, kills = random.Random(), 0
    while kills < MOMENTS:
        # Each kill is of a run from the start or of one that goes on, as it comes.
        again = command(tmp_path, "killed", flags, workers=draw.randint(1, 3))
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1.0) * whole_s)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:  # it was faster: begin anew
            for path in tmp_path.glob("killed*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            assert process.returncode == 0
            whole_s *= 0.7  # the machine was busier when it was measured
            continue
        kills += 1
        final = {path.name for path in tmp_path.glob("killed_*") if not path.name.endswith(".partial")}
        if "killed_text_document.idx" in final:  # .idx is the last of the two
            assert "killed_text_document.bin" in final
    subprocess.run(command(tmp_path, "killed", flags), check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert datasets(tmp_path, "killed") == datasets(tmp_path, "whole")
