"""What every configuration section shares: frozen, keyword-only, checked when built, help text under each field."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class OpenChoice:
    """Names that a setting knows by itself; modules of --import-module may add others.

    Stands in the annotation of a field: `Annotated[str, OpenChoice(("adam", "lion"))]`.
    """

    names: tuple[str, ...]


def as_list(value: object) -> object:
    """A single word as a list of one, for settings that take several."""
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class FixedOnResume:
    """A setting that decides what the weights or the samples mean: a run that goes on from a checkpoint must keep it.

    Stands in the annotation of a field: `Annotated[int, FixedOnResume()]`. A section of which all fields are so says
    it once, by `fixed_on_resume`.
    """

    meaning: Callable[[Any], Any] = lambda value: value
    """Values of the same meaning are the same."""
    weights: bool = False
    """It decides what the weights mean: a run that takes them alone (--finetune) must keep it too."""


@dataclass(frozen=True)
class FirstValueOf:
    """A setting that a part of the run's state begins with; where it is changed, a run that goes on begins that anew.

    Stands in the annotation of a field: `Annotated[int, FirstValueOf("optimizer", "loss_scaler", "cur_scale")]`.
    """

    state: tuple[str, ...]
    """Where a checkpoint keeps it among its states."""

    def __init__(self, *state: str) -> None:
        object.__setattr__(self, "state", state)


@dataclass(frozen=True)
class OneShot:
    """A command to one start of a run, not a property of it: config.yaml and checkpoints do not keep it.

    Stands in the annotation of a field: `Annotated[bool, OneShot()]`.
    """


@dataclass(frozen=True)
class MayDiffer:
    """A setting that ranks of one run may have each for itself, such as a folder of the node's own."""


class Section(BaseModel):
    """One section of the run configuration.

    Field names are Megatron's flag names with underscores (`num_layers` is `--num-layers`); the string under a
    field is its help text. Building a section checks types and ranges (`pydantic.ValidationError`).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    fixed_on_resume: ClassVar[FixedOnResume | None] = None
    """Holds for every field that does not say otherwise; None: the fields may change."""

    @classmethod
    def resume_rule(cls, field: str) -> FixedOnResume | None:
        """What a run that goes on from a checkpoint must keep of a field; None: it may change."""
        rules = [rule for rule in cls.model_fields[field].metadata if isinstance(rule, FixedOnResume)]
        return rules[0] if rules else cls.fixed_on_resume

    @classmethod
    def state_begun(cls, field: str) -> tuple[str, ...] | None:
        """The part of the run's state that begins with a field (`FirstValueOf`); None: none does."""
        return next((rule.state for rule in cls.model_fields[field].metadata if isinstance(rule, FirstValueOf)), None)

    @classmethod
    def marked(cls, mark: type) -> tuple[str, ...]:
        """The fields that have `OneShot` or `MayDiffer` in their annotation."""
        fields = cls.model_fields.items()
        return tuple(name for name, info in fields if any(isinstance(found, mark) for found in info.metadata))

    def effective(self) -> dict[str, Any]:
        """The values that count, as JSON has them: with what a setting left out means in its place."""
        return self.model_dump(mode="json")
