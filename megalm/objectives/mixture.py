"""Several objectives in one run, by turns: which one a sample has follows from its number, in exact shares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megalm.errors import ConfigError
from megalm.objectives.base import (
    Documents,
    Example,
    Field,
    HasStatistics,
    Sample,
    Statistics,
    Transform,
    UsesDocuments,
)


@dataclass(frozen=True)
class Shares:
    """Who has which of the numbers 0, 1, 2, ...: the first of n numbers floor(n x weight), the next so of the rest, ...

    Of W = the sum of the weights (whole numbers) in a row, each has exactly its weight.
    """

    weights: tuple[int, ...]

    @classmethod
    def of(cls, weights: Mapping[str, Fraction]) -> Self:
        """Those of any weights."""
        common = math.lcm(*(weight.denominator for weight in weights.values()))
        return cls(tuple(int(weight * common) for weight in weights.values()))

    def owner(self, number: int) -> int:
        """Whose `number` is."""
        left = sum(self.weights)
        for owner, weight in enumerate(self.weights[:-1]):
            before, after = number * weight // left, (number + 1) * weight // left
            if after > before:
                return owner
            number, left = number - before, left - weight
        return len(self.weights) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureObjective:
    """The examples of its members, and `objective_id` (int64 []): whose a sample is, in the order of the mixture.

    A field that a member lacks is 0 in its rows. A sample has as many tokens as every member has room for.
    """

    names: tuple[str, ...]
    members: tuple[Transform, ...]
    shares: Shares
    shared_tokens: int
    seq_length: int

    @classmethod
    def of(cls, members: Mapping[str, Transform], weights: Mapping[str, Fraction], seq_length: int) -> Self:
        """The mixture of `members` for a model that gets `seq_length`.

        Raises:
            ConfigError: the members are of different families.
        """
        (first, of_all), *others = members.items()
        fields = dict(of_all.fields(seq_length))
        for name, member in others:
            own = member.fields(seq_length)
            if member.shared_tokens != of_all.shared_tokens or any(
                fields.setdefault(key, field) != field for key, field in own.items()
            ):
                raise ConfigError(
                    f"objective_mixture: {name} does not go with {first}, whose samples have another form; take "
                    "objectives of one family"
                )
        return cls(
            names=tuple(members),
            members=tuple(members.values()),
            shares=Shares.of(weights),
            shared_tokens=of_all.shared_tokens,
            seq_length=seq_length,
        )

    @property
    def needs_documents(self) -> bool:
        """Whether a member looks at other documents than a sample's."""
        return any(isinstance(member, UsesDocuments) and member.needs_documents for member in self.members)

    def with_documents(self, documents: Documents) -> Self:
        """The mixture whose members take them from there."""
        members = tuple(
            member.with_documents(documents) if isinstance(member, UsesDocuments) else member for member in self.members
        )
        return replace(self, members=members)

    def sample_tokens(self, seq_length: int) -> int:
        """Of the members' the fewest."""
        return min(member.sample_tokens(seq_length) for member in self.members)

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """Those of all members, and whose each is."""
        found = {name: field for member in self.members for name, field in member.fields(seq_length).items()}
        return found | {"objective_id": Field((), np.int64)}

    @cached_property
    def _own_fields(self) -> Mapping[str, Field]:
        return self.fields(self.seq_length)

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        owner = self.shares.owner(sample.number)
        found = self.members[owner](sample)
        for name, field in self._own_fields.items():
            if name not in found:
                found[name] = np.zeros(field.shape, dtype=field.dtype)
        found["objective_id"] = np.asarray(owner, dtype=np.int64)
        return found

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """The share of each member, and what it says of its own rows; of one name together."""
        owners = batch["objective_id"]
        found: dict[str, tuple[float, float]] = {}
        for number, (name, member) in enumerate(zip(self.names, self.members, strict=True)):
            own = owners == number
            found[f"share_{name}"] = (int(np.count_nonzero(own)), len(owners))
            if isinstance(member, HasStatistics) and own.any():
                for key, (value, count) in member.statistics({name: x[own] for name, x in batch.items()}).items():
                    before = found.get(key, (0, 0))
                    found[key] = (before[0] + value, before[1] + count)
        return found
