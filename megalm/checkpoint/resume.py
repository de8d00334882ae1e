"""What may change between the run that wrote a checkpoint and the one that goes on from it or takes its weights."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from megalm.checkpoint.format import Manifest
from megalm.config.base import FixedOnResume, Section
from megalm.config.sections import RunConfig
from megalm.errors import CheckpointError


def check_same_run(manifest: Manifest, config: Mapping[str, dict[str, Any]], identity: dict[str, Any]) -> list[str]:
    """Settings that differ from the checkpoint's and may, as texts; which may not, the fields say (`FixedOnResume`).

    Raises:
        CheckpointError: settings differ that decide what the weights or the samples mean; all of them listed.
    """
    refused, allowed = _sorted(manifest, config, lambda rule: rule is not None)
    refused += other_inputs(manifest, identity)
    if refused:
        raise CheckpointError(
            f"this is not the run of the checkpoint of step {manifest.step}: {'; '.join(refused)}; "
            "restore these settings, or use another --save (and --load with --finetune to start from its weights)"
        )
    return allowed


def check_same_weights(manifest: Manifest, config: Mapping[str, dict[str, Any]], identity: dict[str, Any]) -> list[str]:
    """For a run that takes the checkpoint's weights alone: what differs of what they were trained with, as texts.

    Raises:
        CheckpointError: settings differ that decide what the weights mean (`FixedOnResume.weights`); all are listed.
    """
    refused, allowed = _sorted(manifest, config, lambda rule: rule is not None and rule.weights)
    if refused:
        raise CheckpointError(
            f"the weights of the checkpoint of step {manifest.step} are of another model: {'; '.join(refused)}; use "
            "the model settings of the run that wrote it (its config.yaml)"
        )
    fixed = {name for cls in _sections().values() for name in cls.model_fields if cls.resume_rule(name) is not None}
    named = [text for text in allowed if text.partition(" ")[0].rpartition(".")[2] in fixed]
    return named + other_inputs(manifest, identity)


def states_of(manifest: Manifest, config: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The checkpoint's states without the parts that a changed setting begins anew (`FirstValueOf`)."""
    states = deepcopy(manifest.states)
    for section, name, _, _ in _changes(manifest, config):
        path = _sections()[section].state_begun(name)
        if path is not None:
            *above, last = path
            block: dict[str, Any] = states
            for key in above:
                block = block.get(key, {})
            block.pop(last, None)
    return states


def other_inputs(manifest: Manifest, identity: dict[str, Any]) -> list[str]:
    """The inputs that are not the checkpoint's, as texts."""
    return [
        f"the {name} is not the one that the run began with ({before:.12} became {value:.12})"
        for name, value in identity.items()
        if (before := manifest.identity.get(name)) is not None and value is not None and before != value
    ]


def _sections() -> dict[str, type[Section]]:
    return {name: info.annotation for name, info in RunConfig.model_fields.items()}  # type: ignore[misc]


def _changes(manifest: Manifest, config: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, Any, Any]]:
    """(section, field, before, now) of all settings that differ, as far as the version which wrote it had them."""
    for section, fields in config.items():
        cls, known = _sections()[section], manifest.config.get(section, {})
        before, now = _effective(cls, known, fields)
        for name, value in now.items():
            rule = cls.resume_rule(name)
            if name not in known or before[name] == value:
                continue
            if rule is None or rule.meaning(before[name]) != rule.meaning(value):
                yield section, name, before[name], value


def _effective(cls: type[Section], *several: dict[str, Any]) -> list[dict[str, Any]]:
    """What counts of sections as JSON has them; as they stand where one is another version's, with other fields."""
    try:
        return [cls.model_validate(values).effective() for values in several]
    except ValueError:
        return list(several)


def _sorted(
    manifest: Manifest, config: Mapping[str, dict[str, Any]], refuses: Callable[[FixedOnResume | None], bool]
) -> tuple[list[str], list[str]]:
    """All changes as texts: those that `refuses` says of their rule, and the others."""
    refused: list[str] = []
    allowed: list[str] = []
    for section, name, before, value in _changes(manifest, config):
        text = f"{section}.{name} was {before!r}, is {value!r}"
        (refused if refuses(_sections()[section].resume_rule(name)) else allowed).append(text)
    return refused, allowed
