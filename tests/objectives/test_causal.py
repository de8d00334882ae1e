"""Next-token prediction: arrays of one sample, equal to megatron-core's masks."""

import pickle
from typing import Any

import numpy as np
import pytest

from megalm.data.samples.sample import Sample
from megalm.errors import ConfigError
from megalm.objectives import OBJECTIVES, build_objective
from megalm.objectives.causal import CausalObjective


def sample(*tokens: int) -> Sample:
    return Sample(0, 0, np.asarray(tokens))


def lists(row: dict[str, Any]) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in row.items()}


def test_labels_are_the_tokens_shifted_by_one() -> None:
    row = CausalObjective()(sample(5, 6, 7, 8))
    assert lists(row) == {"tokens": [5, 6, 7], "labels": [6, 7, 8], "loss_mask": [1.0, 1.0, 1.0]}
    assert [array.dtype.name for array in row.values()] == ["int64", "int64", "float32"]


def test_eod_mask_takes_the_loss_where_the_input_is_eod() -> None:
    tokens = sample(5, 0, 7, 0, 9)
    assert lists(CausalObjective(eod=0, eod_mask_loss=True)(tokens))["loss_mask"] == [1, 0, 1, 0]
    assert lists(CausalObjective(eod=0)(tokens))["loss_mask"] == [1, 1, 1, 1]


def test_padding_has_no_loss_and_becomes_id_zero() -> None:
    row = CausalObjective()(sample(5, 6, -1, -1))
    assert lists(row) == {"tokens": [5, 6, 0], "labels": [6, 0, 0], "loss_mask": [1, 0, 0]}


def test_the_sample_is_not_changed_and_the_objective_is_picklable() -> None:
    given = sample(5, -1, 0)
    objective = pickle.loads(pickle.dumps(CausalObjective(eod=0, eod_mask_loss=True)))
    objective(given)
    assert given.tokens.tolist() == [5, -1, 0]
    assert objective == CausalObjective(eod=0, eod_mask_loss=True)


@pytest.mark.parametrize("option", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_document_ends_need_an_eod(option: str) -> None:
    with pytest.raises(ConfigError, match="drop --" + option.replace("_", "-")):
        CausalObjective(**{option: True})


def test_documents_end_with_each_eod() -> None:
    objective = CausalObjective(eod=0, reset_position_ids=True, reset_attention_mask=True)
    row = objective(sample(5, 0, 0, 7, 8, 0, 9))  # the last input is an eod, and ends the last document
    assert row["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]
    assert row["cu_seqlens"].tolist() == [0, 2, 3, 6, 6, 6, 6]
    assert (row["position_ids"].dtype, row["cu_seqlens"].dtype) == (np.int64, np.int32)
    whole = objective(sample(5, 6, 7))
    assert (whole["position_ids"].tolist(), whole["cu_seqlens"].tolist()) == ([0, 1], [0, 2, 2])


def test_a_row_has_only_what_is_asked_for() -> None:
    given = sample(5, 0, 7)
    assert "position_ids" not in CausalObjective(eod=0, reset_attention_mask=True)(given)
    assert "cu_seqlens" not in CausalObjective(eod=0, reset_position_ids=True)(given)


@pytest.mark.parametrize("options", [{}, {"reset_position_ids": True, "reset_attention_mask": True}])
def test_an_example_holds_what_its_fields_say(options: Any) -> None:
    objective = CausalObjective(eod=0, **options)
    tokens = np.arange(objective.sample_tokens(12))
    example, fields = objective(Sample(3, 0, tokens)), objective.fields(12)
    assert list(example) == list(fields)
    assert {name: (array.shape, array.dtype) for name, array in example.items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in fields.items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_masks_and_positions_equal_megatrons(eod_mask_loss: bool, seed: int) -> None:
    peer = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="pip install megatron-core==0.16.*")
    import torch

    random = np.random.default_rng(seed)
    tokens = random.integers(0, 5 + 10 * seed, size=200)
    tokens[int(random.integers(150, 201)) :] = -1
    mask, loss_mask, positions = peer._get_ltor_masks_and_position_ids(
        torch.from_numpy(tokens[:-1]), 3, True, True, eod_mask_loss, True
    )
    loss_mask[torch.from_numpy(tokens[1:]) == -1] = 0
    objective = CausalObjective(eod=3, eod_mask_loss=eod_mask_loss, reset_position_ids=True, reset_attention_mask=True)
    ours = objective(sample(*tokens))
    np.testing.assert_array_equal(ours["loss_mask"], loss_mask.numpy())
    np.testing.assert_array_equal(ours["position_ids"], positions.numpy())
    lengths = np.diff(ours["cu_seqlens"])
    document = np.repeat(np.arange(len(lengths)), lengths)
    visible = (document[:, None] == document) & np.tri(199, dtype=bool)
    np.testing.assert_array_equal(visible, ~mask[0].numpy())


FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --lr 1 "
    "--vocab-size 300 --train-iters 1 --mock-data --tokenizer-type ByteLevelTokenizer"
)


def test_the_setting_names_the_objective_and_the_tokenizer_its_tokens() -> None:
    from megalm.config.merging.load import load_config
    from megalm.data.tokenizers import ByteLevelTokenizer

    words = FLAGS.split()
    config = load_config([*words, "--eod-mask-loss"])
    assert next(iter(OBJECTIVES)) == "causal"
    assert build_objective(config, ByteLevelTokenizer()) == CausalObjective(eod=256, eod_mask_loss=True)
    with pytest.raises(ConfigError, match="drop --eod-mask-loss"):
        build_objective(config, None)
    with pytest.raises(ConfigError, match=r"objective=casual must be one of causal.* did you mean .*--import-module"):
        load_config([*words, "--objective", "casual"])
