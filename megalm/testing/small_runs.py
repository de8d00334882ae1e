"""Runs small enough for a test: recipes, a workspace with data of its own, and what a run wrote."""

import json
from pathlib import Path
from typing import Any

from megalm.testing import warm
from megalm.testing.processes import Finished, free_port, run

TINY = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, position_embedding_type: rope,
        normalization: RMSNorm, swiglu: true, disable_bias_linear: true, hidden_dropout: 0.1, attention_dropout: 0.1}
batch: {seq_length: 64, micro_batch_size: 4, global_batch_size: 16}
training: {train_iters: 10, eval_iters: 2}
optimizer: {lr: 0.003, lr_decay_style: cosine, lr_decay_iters: 60, lr_warmup_iters: 5, adam_beta2: 0.95}
data: {split: "95, 5, 0"}
logging: {log_interval: 1}
"""
"""A model for data of its own."""
RECIPE = """
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, position_embedding_type: rope,
        normalization: RMSNorm, swiglu: true, disable_bias_linear: true, hidden_dropout: 0.1, attention_dropout: 0.0,
        vocab_size: 256}
batch: {seq_length: 64, micro_batch_size: 2, global_batch_size: 8}
training: {train_iters: 24, eval_iters: 0}
optimizer: {lr: 0.003, lr_decay_style: cosine, lr_warmup_iters: 5}
data: {mock_data: true}
checkpoint: {save_interval: 8}
logging: {log_interval: 1}
"""
"""What every launcher starts, on mock data. Its hidden dropout is that of one device in every layout; attention's would
depend on the tensor-parallel size."""
RANKS = 4
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
"""The flags that split RECIPE's model over RANKS."""
STEPS = 24
"""What RECIPE trains."""
SCRIPT = "launch/pretrain_gpt.py"


def write_recipe(folder: Path) -> Path:
    """RECIPE as a file in `folder`."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none if the run has not begun."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


def losses_in_order(folder: Path) -> list[float]:
    """The training loss of each step, from the first; no step may be left out."""
    found = losses(folder)
    assert list(found) == list(range(1, len(found) + 1)), "each step stands there once, in order"
    return list(found.values())


class Workspace:
    """A folder with a tokenizer, a dataset and a recipe, on which jobs are started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(TINY)

    def prepare(self) -> None:
        """Make the tokenizer and the dataset with the command line."""
        corpus, tokenizer = self.folder / "corpus.jsonl", self.folder / "tokenizer"
        for command in (
            ("corpus", "--output", corpus, "--size-mb", "1"),
            ("train-tokenizer", "--input", corpus, "--output-prefix", tokenizer, "--vocab-size", "1000"),
            ("preprocess", "--input", corpus, "--output-prefix", self.folder / "corpus", "--append-eod",
             "--workers", "2", "--tokenizer-type", "GPTSentencePieceTokenizer",
             "--tokenizer-model", f"{tokenizer}.model"),
        ):  # fmt: skip
            done = warm.run("megalm", *command)
            assert done.code == 0, done.output

    @property
    def inputs(self) -> list[str]:
        """Flags that name the recipe, the dataset and the tokenizer."""
        prefix = self.folder / "corpus_text_document"
        return [
            "--config", str(self.recipe), "--data-path", str(prefix),
            "--tokenizer-model", str(self.folder / "tokenizer.model"),
        ]  # fmt: skip

    def train(self, *flags: str | Path, ranks: int | None = 2, timeout: float = 240) -> Finished:
        """Train on warm ranks, as the deepspeed launcher would start them; `ranks` None: in one process without it."""
        return warm.run(SCRIPT, *self.inputs, *flags, ranks=ranks, timeout=timeout)

    def job(self, *flags: str | Path, ranks: int = 2) -> warm.Job:
        """The same, still running."""
        return warm.Job(SCRIPT, *self.inputs, *flags, ranks=ranks)

    def deepspeed(self, *flags: str | Path, ranks: int = 2, timeout: float = 240) -> Finished:
        """Train through the deepspeed launcher itself."""
        return run(
            "deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), SCRIPT,
            *self.inputs, *flags, timeout=timeout,
        )  # fmt: skip
