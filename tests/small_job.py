"""A tiny training job on four ranks, as the tests of the launchers start it.

Its hidden dropout is that of one device in every layout; attention's would depend on the tensor-parallel size.
"""

import json
import os
from pathlib import Path

from e2e.launching import environment

RANKS = 4
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
"""The flags that split the model over the ranks."""
RECIPE = """
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, position_embedding_type: rope,
        normalization: RMSNorm, swiglu: true, disable_bias_linear: true, hidden_dropout: 0.1, attention_dropout: 0.0,
        vocab_size: 256}
batch: {seq_length: 64, micro_batch_size: 2, global_batch_size: 16}
training: {train_iters: 24, eval_iters: 0}
optimizer: {lr: 0.003, lr_decay_style: cosine, lr_warmup_iters: 5}
data: {mock_data: true}
checkpoint: {save_interval: 8}
logging: {log_interval: 1}
"""
STEPS = 24


def write_recipe(folder: Path) -> Path:
    """The recipe, in `folder`."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def quiet_environment() -> dict[str, str]:
    """The environment of a user, without traces of another launch or scheduler; one thread a rank."""
    dropped = ("SLURM_", "OMPI_", "PMI", "PMIX", "TORCHELASTIC", "MEGALM_")
    kept = {name: value for name, value in environment().items() if not name.startswith(dropped)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")]))}


def losses(folder: Path) -> list[float]:
    """The training loss of each step, from the first."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(found) == list(range(1, len(found) + 1)), "each step stands there once, in order"
    return list(found.values())
