"""A small real dataset made by the command line, and the real launchers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, position_embedding_type: rope,
        normalization: RMSNorm, swiglu: true, disable_bias_linear: true, hidden_dropout: 0.1, attention_dropout: 0.1}
batch: {seq_length: 64, micro_batch_size: 4, global_batch_size: 16}
training: {train_iters: 10, eval_iters: 2}
optimizer: {lr: 0.003, lr_decay_style: cosine, lr_decay_iters: 60, lr_warmup_iters: 5, adam_beta2: 0.95}
data: {split: "95, 5, 0"}
logging: {log_interval: 1}
"""


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The error messages that megalm printed."""
        return re.findall(r"^error[^:\n]*: .*", self.output, flags=re.MULTILINE)


def environment() -> dict[str, str]:
    """This environment with the virtual environment's programs first and no trace of another launch."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def run(
    *command: str | Path, timeout: float = 240, cwd: Path = REPOSITORY, environ: dict[str, str] | None = None
) -> Finished:
    """Run a command to its end; it and all that it started are killed when the time is over."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() if environ is None else environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s:\n{output}") from None
    return Finished(process.returncode, output)


def copy_repository(folder: Path) -> None:
    """Copy the repository's files as git sees them into `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


class Workspace:
    """A folder with a tokenizer, a dataset and a recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(TINY)

    @property
    def inputs(self) -> list[str]:
        """Flags that name the recipe, the dataset and the tokenizer."""
        prefix = self.folder / "corpus_text_document"
        return [
            "--config", str(self.recipe), "--data-path", str(prefix),
            "--tokenizer-model", str(self.folder / "tokenizer.model"),
        ]  # fmt: skip

    def deepspeed(self, *flags: str | Path, ranks: int = 2, timeout: float = 240) -> Finished:
        """Train through the deepspeed launcher."""
        return run(
            "deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()),
            "launch/pretrain_gpt.py", *self.inputs, *flags, timeout=timeout,
        )  # fmt: skip

    def ten_steps(self, stage: int) -> Path:
        """The run folder of ten steps on two ranks at one ZeRO stage with the shipped JSON; trained once."""
        folder = self.folder / f"zero{stage}"
        if not folder.exists():
            done = self.deepspeed("--deepspeed_config", f"ds_configs/zero{stage}.json", "--save", folder)
            assert done.code == 0, done.output
            assert f"ZeRO {stage}" in done.output
        return folder

    def python(self, *flags: str | Path, timeout: float = 240) -> Finished:
        """Train in one process, without a launcher."""
        return run(sys.executable, "launch/pretrain_gpt.py", *self.inputs, *flags, timeout=timeout)
