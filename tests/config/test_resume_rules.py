"""What may change on resume, as the fields say."""

from megalm.config import RunConfig
from megalm.config.data import split_shares
from megalm.config.merging.settings import SECTIONS


def test_model_data_and_seed_are_fixed_and_nothing_else() -> None:
    fixed = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields
             if cls.resume_rule(name)}  # fmt: skip
    model = {f"model.{name}" for name in RunConfig.model_fields["model"].annotation.model_fields}  # type: ignore[union-attr]
    data = {"data.split", "data.sampling", "data.mock_data", "data.eod_mask_loss"}
    assert fixed == model | data | {"batch.seq_length", "training.seed"}


def test_a_split_is_compared_by_its_shares() -> None:
    rule = SECTIONS["data"].resume_rule("split")
    assert rule is not None
    assert rule.meaning is split_shares
    assert rule.meaning("969, 30, 1") == rule.meaning("969,30,1") != rule.meaning("9,1")
