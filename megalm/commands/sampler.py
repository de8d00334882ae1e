"""--sample-prompt: what the model of a run makes of a text, on its ranks, whatever its layout."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch

from megalm.commands.generate import read_tokens, written_text
from megalm.config.sections import RunConfig
from megalm.config.spans import SequenceIds, decoder_seq_length
from megalm.data.tokenizers import Tokenizer
from megalm.data.tokenizers.base import SPECIAL_NAMES
from megalm.errors import ConfigError
from megalm.models.generation import continue_greedily
from megalm.objectives.masked import STANDS_IN

if TYPE_CHECKING:
    from megalm.engine.engine import Engine  # DeepSpeed takes seconds to import

_MASKS = re.compile("|".join(map(re.escape, SPECIAL_NAMES["mask"])))


class Sampler(Protocol):
    """Shows what the model in training makes of the prompt, with the likeliest tokens."""

    def text(self, engine: "Engine", stopped: Callable[[], bool] = lambda: False) -> str | None:
        """The result, None where it was `stopped`; every rank calls it."""


def build_sampler(config: RunConfig, tokenizer: Tokenizer | None) -> Sampler | None:
    """The sampler that --sample-prompt asks for, if it does.

    Raises:
        ConfigError: no tokenizer, or a prompt that leaves no room in seq_length, or without what is to be filled in.
    """
    prompt = config.training.sample_prompt
    if prompt is None:
        return None
    if tokenizer is None:
        raise ConfigError("sample_prompt needs a tokenizer; give --tokenizer-model FILE or drop --sample-prompt")
    kind: type[Continuation | Writing | Filling] = Continuation
    if config.model.encoder_decoder:
        kind = Writing
    elif config.model.is_encoder:
        kind = Filling
    return kind.of(config, tokenizer, prompt)


@dataclass(frozen=True)
class Continuation:
    """The prompt of a decoder, continued."""

    tokenizer: Tokenizer
    tokens: list[int]
    count: int
    """Most tokens that continue it."""

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, prompt: str) -> Self:
        """That of a run."""
        tokens, length = tokenizer.encode(prompt), config.batch.seq_length
        if not 0 < len(tokens) < length:
            raise ConfigError(
                f"sample_prompt has {len(tokens)} tokens; it must have at least 1 and less than seq_length={length}"
            )
        return cls(tokenizer, tokens, min(config.training.sample_tokens, length - len(tokens)))

    def text(self, engine: "Engine", stopped: Callable[[], bool] = lambda: False) -> str | None:
        """The prompt with its continuation."""
        eod = self.tokenizer.special("eod")
        new = continue_greedily(engine.next_logits, self.tokens, self.count, eod, engine.device, stopped)
        if new is None:
            return None
        return self.tokenizer.decode(self.tokens + [token for token in new if token != eod])


@dataclass(frozen=True)
class Writing:
    """What an encoder-decoder writes of the prompt."""

    tokenizer: Tokenizer
    ids: SequenceIds
    tokens: list[int]
    count: int
    """Most tokens of it."""

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, prompt: str) -> Self:
        """That of a run."""
        ids = SequenceIds.of(tokenizer.special_ids)
        tokens = read_tokens(tokenizer, ids, prompt)
        _check_fits(len(tokens), 2, config)
        room = decoder_seq_length(config)
        assert room is not None, "decoder_seq_length is filled in before the run is built"
        return cls(tokenizer, ids, tokens, min(config.training.sample_tokens, room))

    def text(self, engine: "Engine", stopped: Callable[[], bool] = lambda: False) -> str | None:
        """What the decoder writes, with the names of sentinels."""
        read = {"tokens": torch.tensor([self.tokens], device=engine.device)}
        read["padding_mask"] = torch.ones_like(read["tokens"], dtype=torch.bool)

        def next_logits(written_1T: torch.Tensor) -> torch.Tensor:
            return engine.logits_at(read | {"decoder_tokens": written_1T}, [written_1T.shape[1] - 1])[:, 0]

        new = continue_greedily(next_logits, [self.ids.start], self.count, self.ids.end, engine.device, stopped)
        return None if new is None else written_text(self.tokenizer, self.ids, new)


@dataclass(frozen=True)
class Filling:
    """The prompt of an encoder, each of its masks filled in beside the others as they are."""

    tokenizer: Tokenizer
    tokens: list[int]
    """Between those that stand around a text."""
    places: list[int]

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, prompt: str) -> Self:
        """That of a run."""
        special: dict[str, int] = {}
        for name, others in STANDS_IN.items():
            found = [number for other in others if (number := tokenizer.special(other)) is not None]
            if not found:
                raise ConfigError(f"sample_prompt needs a tokenizer with a {name} token; drop --sample-prompt")
            special[name] = found[0]
        first, *rest = (tokenizer.encode(part) for part in _MASKS.split(prompt))
        if not rest:
            raise ConfigError(f"sample_prompt={prompt} has no mask that could be filled in; write [MASK] in it")
        tokens, places = [special["cls"], *first], []
        for part in rest:
            places.append(len(tokens))
            tokens += [special["mask"], *part]
        tokens.append(special["sep"])
        _check_fits(len(tokens), 3, config)
        return cls(tokenizer, tokens, places)

    def text(self, engine: "Engine", stopped: Callable[[], bool] = lambda: False) -> str | None:
        """The prompt without its masks."""
        if stopped():
            return None
        tokens_1T = torch.tensor([self.tokens], device=engine.device)
        fields = {"tokens": tokens_1T, "padding_mask": torch.ones_like(tokens_1T, dtype=torch.bool)}
        filled = list(self.tokens)
        likeliest = engine.logits_at(fields, self.places)[0].argmax(dim=-1)
        for place, token in zip(self.places, likeliest.tolist(), strict=True):
            filled[place] = token
        return self.tokenizer.decode(filled[1:-1])


def _check_fits(count: int, least: int, config: RunConfig) -> None:
    """That a prompt says something beside the tokens around it, and fits."""
    if not least <= count <= config.batch.seq_length:
        raise ConfigError(
            f"sample_prompt has {count} tokens with those around it; it must have {least} to "
            f"seq_length={config.batch.seq_length}"
        )
