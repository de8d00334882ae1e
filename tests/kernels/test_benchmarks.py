"""The benchmarks of kernels and of a training step run and print their tables; nothing is asked of the figures."""

import subprocess
import sys
from pathlib import Path

import pytest
from kernels.fused import needs_fused

pytestmark = [needs_fused, pytest.mark.e2e]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def printed(*command: str) -> str:
    """What a benchmark says."""
    answer = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=BENCHMARKS, timeout=280)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.long
def test_operators() -> None:
    table = printed(
        "kernels.py", "--only", "rotary", "attention", "residual", "--tokens", "2048", "--rounds", "1", "--no-compile"
    )
    rows = [line.split("|")[1].strip() for line in table.splitlines() if "| torch " in line]
    assert rows == [
        *("rotary", "rotary + backward"),
        *("causal attention", "causal attention + backward"),
        *("dropout + residual", "dropout + residual + backward"),
    ]


@pytest.mark.long
@pytest.mark.parametrize("style", ["llama", "bert", "t5"])
def test_training_step(style: str) -> None:
    pytest.importorskip("transformers")
    small = [
        *("--style", style, "--layers", "1", "--seq-length", "16", "--batch", "2"),
        *("--rounds", "1", "--block", "1", "--no-compile"),
    ]
    text = printed("train_step.py", *small, "--parts", "speed", "gains", "loss", "memory")
    for row in ("| megalm fused |", "| Hugging Face eager |", "| norms |", "| linear |", "in chunks |"):
        assert row in text, text
