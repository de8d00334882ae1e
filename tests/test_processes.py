"""A process whose reader goes away: `| head`, a closed terminal."""

import io
import os
import subprocess
import sys

import pytest

from megalm.processes import UnreadFile

PROGRAMS = (
    "from megalm.cli import main; sys.exit(main(['shipped']))",
    "from megalm.cli import main; sys.exit(main(['submit', '--help']))",
    "from megalm.cli import main; sys.exit(main(['plan', '--no-such']))",
    "from megalm.entry import main; main(['--help'])",
)
CODES = (0, 0, 2, 0)


def test_what_follows_the_readers_end_is_lost_and_the_writer_goes_on() -> None:
    reading, writing = os.pipe()
    stream = io.TextIOWrapper(io.BufferedWriter(UnreadFile(writing, "wb")), write_through=True)
    print("first", file=stream, flush=True)
    assert os.read(reading, 100) == b"first\n"
    os.close(reading)
    for _ in range(3):
        print("line" * 10_000, file=stream, flush=True)
    os.write(writing, b"others that write there are rid of it too")
    stream.close()


def test_other_errors_stay_errors() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        UnreadFile(full.fileno(), "wb", closefd=False).write(b"x")


def test_no_command_shows_a_traceback_when_nobody_reads() -> None:
    """One process for all: each is forked with both streams closed at the other end, and tells nothing but its code."""
    text = f"""
import os, sys
import megalm.cli, megalm.entry
reading, writing = os.pipe()
os.close(reading)
for text in {PROGRAMS!r}:
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1); os.dup2(writing, 2)
        try:
            exec(text)
        finally:
            sys.stdout.flush(); sys.stderr.flush()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.stderr) == ([str(code) for code in CODES], "")
