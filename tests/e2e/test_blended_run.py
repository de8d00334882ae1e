"""Blended data from the command line: losses by dataset, validation sets by name, changes on resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.testing import warm
from megalm.testing.processes import Finished
from megalm.testing.small_runs import SCRIPT, TINY, metrics

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and three datasets: one of noise, one of a single token, one of a pattern."""
    folder = tmp_path_factory.mktemp("blend")
    (folder / "tiny.yaml").write_text(TINY.replace("global_batch_size: 16", "global_batch_size: 8"))
    random = np.random.default_rng(0)
    texts = {"noise": random.integers(0, 256, 9000), "same": np.full(9000, 7), "pattern": np.arange(9000) % 5}
    for name, tokens in texts.items():
        with IndexedDatasetBuilder(folder / name, "uint16") as builder:
            builder.add_documents(tokens, np.full(90, 100, dtype=np.int32))
            builder.finalize()
    return folder


def train(folder: Path, save: Path, *flags: str, ranks: int = 1) -> Finished:
    names = ("noise", "same", "pattern")
    return warm.run(
        SCRIPT,
        "--config", str(folder / "tiny.yaml"), "--vocab-size", "256", "--save", str(save), "--eval-iters", "1",
        "--valid-data-path", *(str(folder / name) for name in names), "--multiple-validation-sets",
        "--data-cache-path", str(folder / "cache"), *flags, ranks=ranks if ranks > 1 else None,
    )  # fmt: skip


def blend(folder: Path, **weights: float) -> list[str]:
    words = [word for name, weight in weights.items() for word in (str(weight), str(folder / name))]
    return ["--train-data-path", *words]


def order(save: Path, step: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((save / f"step_{step}" / "manifest.json").read_text())["states"]["order"]
    return record


def test_a_blend_is_reported_by_dataset_and_goes_on_after_changes(folder: Path, tmp_path: Path) -> None:
    three = blend(folder, noise=0.5, same=0.25, pattern=0.25)
    done = train(folder, tmp_path, *three, "--train-iters", "12", "--exit-interval", "6", "--lr", "0.01")
    assert done.code == 0, done.output
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert {"loss/noise", "loss/same", "loss/pattern"} <= rows[-1].keys()
    mean = 0.5 * rows[-1]["loss/noise"] + 0.25 * rows[-1]["loss/same"] + 0.25 * rows[-1]["loss/pattern"]
    assert rows[-1]["loss"] == pytest.approx(mean, rel=1e-5), "8 samples a step: 4, 2 and 2"
    assert rows[-1]["loss/same"] < rows[-1]["loss/noise"] - 0.5
    assert [d["consumed"] for d in order(tmp_path, 6)["datasets"]] == [24, 12, 12]

    changed = blend(folder, noise=0.25, same=0.25, pattern=0.5)
    flags = ["--train-iters", "9", "--global-batch-size", "16", "--lr", "0.01"]
    done = train(folder, tmp_path, *changed, *flags, ranks=2)
    assert done.code == 0, done.output
    assert metrics(tmp_path)[-1]["consumed_samples"] == 48 + 3 * 16
    record = order(tmp_path, 9)
    assert (record["start"], record["weights"]) == (48, [0.25, 0.25, 0.5])
    assert [d["base"] for d in record["datasets"]] == [24, 12, 12]
    assert [d["consumed"] for d in record["datasets"]] == [24 + 12, 12 + 12, 12 + 24]

    last = metrics(tmp_path)[-1]
    names = [f"validation_loss/{name}" for name in ("noise", "same", "pattern")]
    assert last["validation_loss"] == pytest.approx(sum(last[name] for name in names) / 3, rel=1e-5)
    assert "validation noise loss at iteration 9" in done.output
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"lm loss noise", "lm loss validation same", "lm loss validation ppl pattern", "lm loss validation"} <= {
        *tags
    }
    assert len(list((folder / "cache").glob("*.json"))) >= 4

    done = train(folder, tmp_path, *blend(folder, noise=1, same=1), "--train-iters", "12", "--global-batch-size", "16")
    assert done.code == 4, done.output
    assert len(done.errors) == 1
    assert "is gone" in done.errors[0]
    assert "--allow-changed-data" in done.errors[0]


def test_stream_and_full_validation_train_and_resume(folder: Path, tmp_path: Path) -> None:
    flags = ["--sampling", "stream", "--full-validation", "--train-data-path", str(folder / "noise")]
    done = train(folder, tmp_path / "whole", *flags, "--train-iters", "4")
    assert done.code == 0, done.output
    assert "valid noise 140 samples" in done.output
    assert train(folder, tmp_path / "parts", *flags, "--train-iters", "4", "--exit-interval", "2").code == 0
    assert train(folder, tmp_path / "parts", *flags, "--train-iters", "4").code == 0
    whole, parts = ({row["step"]: row for row in metrics(tmp_path / name)} for name in ("whole", "parts"))
    assert [parts[step].get("loss") for step in (3, 4)] == [whole[step].get("loss") for step in (3, 4)]
    assert parts[4]["validation_loss/same"] == whole[4]["validation_loss/same"]
