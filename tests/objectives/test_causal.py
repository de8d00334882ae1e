"""Next-token prediction: arrays of one sample, equal to megatron-core's masks."""

import pickle
from typing import Any

import numpy as np
import pytest

from megalm.errors import ConfigError
from megalm.objectives.causal import CausalObjective


def lists(row: dict[str, Any]) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in row.items()}


def test_labels_are_the_tokens_shifted_by_one() -> None:
    row = CausalObjective()(np.asarray([5, 6, 7, 8]))
    assert lists(row) == {"tokens": [5, 6, 7], "labels": [6, 7, 8], "loss_mask": [1.0, 1.0, 1.0]}
    assert [array.dtype.name for array in row.values()] == ["int64", "int64", "float32"]


def test_eod_mask_takes_the_loss_where_the_input_is_eod() -> None:
    sample = np.asarray([5, 0, 7, 0, 9])
    assert lists(CausalObjective(eod=0, eod_mask_loss=True)(sample))["loss_mask"] == [1, 0, 1, 0]
    assert lists(CausalObjective(eod=0)(sample))["loss_mask"] == [1, 1, 1, 1]


def test_padding_has_no_loss_and_becomes_id_zero() -> None:
    row = CausalObjective()(np.asarray([5, 6, -1, -1]))
    assert lists(row) == {"tokens": [5, 6, 0], "labels": [6, 0, 0], "loss_mask": [1, 0, 0]}


def test_the_sample_is_not_changed_and_the_objective_is_picklable() -> None:
    sample = np.asarray([5, -1, 0])
    objective = pickle.loads(pickle.dumps(CausalObjective(eod=0, eod_mask_loss=True)))
    row = objective(sample)
    row["tokens"][0] = 99
    assert sample.tolist() == [5, -1, 0]
    assert objective == CausalObjective(eod=0, eod_mask_loss=True)


def test_eod_mask_without_an_eod_is_refused() -> None:
    with pytest.raises(ConfigError, match="--eod-mask-loss"):
        CausalObjective(eod_mask_loss=True)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_loss_mask_equals_megatrons(eod_mask_loss: bool) -> None:
    peer = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="pip install megatron-core==0.16.*")
    import torch

    sample = np.random.default_rng(0).integers(0, 5, size=200)
    _, theirs, _ = peer._get_ltor_masks_and_position_ids(
        torch.from_numpy(sample[:-1]), 3, False, False, eod_mask_loss, False
    )
    ours = CausalObjective(eod=3, eod_mask_loss=eod_mask_loss)(sample)
    np.testing.assert_array_equal(ours["loss_mask"], theirs.numpy())
