"""What may change between the run that wrote a checkpoint and the one that goes on from it."""

from typing import Any

from megalm.checkpoint.format import Manifest
from megalm.config.sections import RunConfig
from megalm.errors import CheckpointError


def check_same_run(manifest: Manifest, config: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Settings that differ from the checkpoint's and may, as texts; which may not, the fields say (`FixedOnResume`).

    Raises:
        CheckpointError: settings differ that decide what the weights or the samples mean; all of them listed.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for section, fields in config.items():
        cls: Any = RunConfig.model_fields[section].annotation
        for name, value in fields.items():
            if name not in manifest.config.get(section, {}):
                continue  # a setting that the version which wrote it did not have
            before, rule = manifest.config[section][name], cls.resume_rule(name)
            if before == value or (rule is not None and rule.meaning(before) == rule.meaning(value)):
                continue
            (allowed if rule is None else refused).append(f"{section}.{name} was {before!r}, is {value!r}")
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
