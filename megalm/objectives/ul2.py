"""UL2's mixture of denoisers: short spans, long or many spans, or the rest of the text, each told by a token in front.

With M a token of the mode (R, S, X), S0, ... the sentinels and E the end: the encoder reads `M a S0 d e S1 g E` and the
decoder writes `S0 b c S1 f E`; of mode S it reads `M a b c S0 E`, and the decoder writes `S0 d e f g E`. A decoder
alone has both in one row, and what is read is a prefix that sees itself.
Source: Tay et al. 2022, arXiv:2205.05131, section 3.1 and table 1.

Shapes: N tokens of a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from megalm.config.noise import Denoiser
from megalm.config.sections import RunConfig
from megalm.config.spans import SENTINELS, denoisings
from megalm.errors import ConfigError
from megalm.objectives.base import Statistics
from megalm.objectives.forms import Ids
from megalm.objectives.span import DenoisingObjective, corrupted, form_of, sentinels_and_ids


@dataclass(frozen=True, kw_only=True)
class Ul2Objective(DenoisingObjective):
    """Each sample by one of the denoisers, all as likely.

    N is the longest text of which there is room for what every denoiser makes of it, so that none loses a token.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ("pad", "bos", "eos", "eod", "mode_r", "mode_s", "mode_x", *SENTINELS)
    purpose: ClassVar[str] = "ul2"

    denoisers: tuple[Denoiser, ...]
    modes: Mapping[str, int]
    """Mode -> the token in front of its texts."""

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's settings ask for.

        Raises:
            ConfigError: tokens of modes, or sentinels, are missing.
        """
        denoisers, kind, form = Denoiser.read(config.data.ul2_denoisers), denoisings(config)["ul2"], form_of(config)
        names = sorted({denoiser.mode for denoiser in denoisers})
        if config.data.mock_data and not config.tokenizer.is_given:
            modes: dict[str, int | None] = {name: 2 + number for number, name in enumerate(names)}
        else:
            modes = {name: special[f"mode_{name}"] for name in names}
        found = {name: number for name, number in modes.items() if number is not None}
        if len(found) < len(modes):
            lacking = ", ".join(f"[{name.upper()}]" for name in names if name not in found)
            raise ConfigError(
                f"objective=ul2 needs a tokenizer with the tokens of its modes, {lacking}; add some: "
                "--vocab-extra-ids 100"
            )
        spans = kind.spans(form.text_tokens(kind))
        sentinels, ids = sentinels_and_ids("ul2", spans, config, special, tuple(found.values()))
        return cls(
            denoisers=denoisers,
            kind=kind,
            form=form,
            modes=found,
            sentinels=sentinels,
            ids=ids,
            seed=config.training.seed,
        )

    def sides(self, text: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
        """As one denoiser makes them, its mode in front of what is read."""
        denoiser = self.denoisers[int(generator.integers(len(self.denoisers)))]
        inputs, targets = corrupted(text, denoiser.noise, self.sentinels, self.ids.end, generator)
        return np.concatenate(([self.modes[denoiser.mode]], inputs)), targets

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """As of span corruption, and the share of each mode."""
        modes = batch["tokens"][:, 0]
        shares = {
            f"share_{mode}": (int(np.count_nonzero(modes == number)), len(modes)) for mode, number in self.modes.items()
        }
        return {**self.form.statistics(batch, self.sentinels, self.kind.head), **shares}
