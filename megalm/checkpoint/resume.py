"""What may change between the run that wrote a checkpoint and the one that goes on from it."""

from typing import Any

from megalm.checkpoint.format import Manifest
from megalm.config.data import DataConfig
from megalm.errors import CheckpointError

_FIXED_SECTIONS = ("model",)
_FIXED_FIELDS = {
    "batch": ("seq_length",),
    "training": ("seed",),
    "data": (
        "split",
        "sampling",
        "mock_data",
        "eod_mask_loss",
    ),  # not the paths: the record of the order knows the data
}


def check_same_run(manifest: Manifest, config: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Settings that differ from the checkpoint's and may, as texts.

    Raises:
        CheckpointError: settings differ that decide what the weights or the samples mean; all of them listed.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for section, fields in config.items():
        for name, value in fields.items():
            if name not in manifest.config.get(section, {}):
                continue  # a setting that the version which wrote it did not have
            before = manifest.config[section][name]
            if before == value or (name == "split" and _shares(before) == _shares(value)):
                continue
            text = f"{section}.{name} was {before!r}, is {value!r}"
            fixed = section in _FIXED_SECTIONS or name in _FIXED_FIELDS.get(section, ())
            (refused if fixed else allowed).append(text)
    for name, value in identity.items():
        before = manifest.identity.get(name)
        if before is None or value is None or before == value:
            continue
        refused.append(f"the {name} is not the one that the run began with ({before:.12} became {value:.12})")
    if refused:
        raise CheckpointError(
            f"this is not the run of the checkpoint of step {manifest.step}: {'; '.join(refused)}; "
            "restore these settings, or use another --save (and --load with --finetune to start from its weights)"
        )
    return allowed


def _shares(split: str) -> tuple[float, float, float]:
    """The shares of a split, however it is spelled."""
    return DataConfig(split=split).split_shares()
