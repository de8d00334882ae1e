"""Text generation with a key/value cache: one prompt, several samples, each reproducible by (seed, sample number).

Shapes: B samples, T sequence, V padded vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.errors import ConfigError
from megalm.models.blocks.attention import KVCache
from megalm.models.blocks.randomness import named_generator
from megalm.models.contract import LanguageModel

_COLDEST = 1e-4
"""Below this temperature only the likeliest token is left, and logits divided by it would leave fp32."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 1234,
    stop_token: int | None = None,
    start_token: int | None = None,
) -> list[list[int]]:
    """Continuations of one prompt, `num_samples` lists of at most `max_new_tokens` new token ids.

    A continuation ends with `stop_token` (included) where the model produced it. Temperature 0 takes the most probable
    token; otherwise logits are divided by it, cut to the `top_k` most probable tokens (0: all), then to the smallest
    set of them whose probabilities reach `top_p` (Holtzman et al. 2020, arXiv:1904.09751), and sampled. Sample n of a
    seed draws from a generator of its own, whatever the number of samples.

    Of an encoder-decoder the prompt is what the encoder reads, and the continuations are what the decoder writes after
    `start_token`, which it needs.

    The model runs in eval mode and is left in the mode that it had. Raises ConfigError for arguments out of range and,
    with learned positions, for a text longer than max_position_embeddings: there is no sliding window, whose result
    would depend on where it starts.
    """
    problems = _problems(model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, num_samples)
    if problems:
        raise ConfigError(problems)
    was_training = model.training
    model.eval()
    try:
        choose = _greedy if temperature < _COLDEST else _sampler(temperature, top_k, top_p, num_samples, seed)
        cache, pieces = _prompted(model, prompt_tokens, max_new_tokens, start_token)
        return _decode(model, cache, pieces, max_new_tokens, num_samples, choose, stop_token)
    finally:
        model.train(was_training)


def continue_greedily(
    next_logits: Callable[[Tensor], Tensor],
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    stop_token: int | None,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> list[int] | None:
    """The likeliest token after the prompt, and so on: at most `max_new_tokens` ids, up to `stop_token` (included).

    None where `stopped()` before one of them.

    `next_logits` takes the tokens so far (1, T) and gives the next one's logits (1, V). It sees all of them every time:
    for a model in training, in whatever layout, which keeps no keys and values.
    """
    tokens = list(prompt_tokens)
    for _ in range(max_new_tokens):
        if stopped():
            return None
        tokens.append(int(next_logits(torch.tensor([tokens], device=device)).argmax()))
        if tokens[-1] == stop_token:
            break
    return tokens[len(prompt_tokens) :]


def truncate_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits (B, V) with every token outside top-k, then outside top-p of what is left, at -inf.

    Among equal logits the lower token ids are kept, so exactly `top_k` tokens remain; at least one always does.
    """
    ordered_BV, tokens_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered_BV[:, top_k:] = float("-inf")
    probabilities_BV = ordered_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # probability of all better tokens
    outside_BV = before_BV >= top_p
    outside_BV[:, 0] = False
    ordered_BV = ordered_BV.masked_fill(outside_BV & (top_p < 1.0), float("-inf"))
    return torch.empty_like(logits_BV).scatter_(1, tokens_BV, ordered_BV)


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Token ids (B,) drawn from softmax(logits) by inverting its distribution function at uniforms in [0, 1)."""
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    # Relative to the rounded total, so that the drawn token always has probability.
    targets_B1 = uniforms_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(1)


def _greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def _sampler(temperature: float, top_k: int, top_p: float, num_samples: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A function from logits (B, V) to sampled tokens (B,); row n draws from the generator of sample n."""
    generators = [named_generator(seed, "generate", number) for number in range(num_samples)]

    def choose(logits_BV: Tensor) -> Tensor:
        uniforms_B = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        return sample_tokens(truncate_logits(logits_BV / temperature, top_k, top_p), uniforms_B.to(logits_BV.device))

    return choose


@dataclass(frozen=True)
class Piece:
    """The next tokens of a text, as a batch."""

    tensors: dict[str, Tensor]
    seed: int | None = None

    @classmethod
    def after(cls, cache: KVCache, tokens_BT: Tensor) -> "Piece":
        """Tokens whose positions follow those that `cache` holds."""
        positions_1T = torch.arange(cache.length, cache.length + tokens_BT.shape[1], device=tokens_BT.device)[None]
        return cls({"tokens": tokens_BT, "position_ids": positions_1T})

    @classmethod
    def written_after(cls, _cache: KVCache, tokens_BT: Tensor) -> "Piece":
        """Tokens that the decoder has written; of those that the encoder reads there are no more."""
        return cls({"tokens": tokens_BT[:, :0], "decoder_tokens": tokens_BT})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The field `name`, or None."""
        return self.tensors.get(name)


def _prompted(
    model: LanguageModel, prompt_tokens: Sequence[int], max_new_tokens: int, start_token: int | None
) -> tuple[KVCache, Iterator[Piece]]:
    """A cache with room for the text, and what the model reads before the first new token."""
    prompt_1T = torch.tensor([list(prompt_tokens)], device=next(model.parameters()).device)
    if model.config.encoder_decoder:
        assert start_token is not None, "a decoder of its own starts from a token"
        start_11 = torch.full_like(prompt_1T[:, :1], start_token)
        return KVCache(max_new_tokens), iter([Piece({"tokens": prompt_1T, "decoder_tokens": start_11})])
    cache = KVCache.of(model.config, len(prompt_tokens) + max_new_tokens)
    return cache, (Piece.after(cache, piece_1T) for piece_1T in cache.pieces(prompt_1T))


def _decode(
    model: LanguageModel,
    cache: KVCache,
    pieces: Iterator[Piece],
    max_new_tokens: int,
    num_samples: int,
    choose: Callable[[Tensor], Tensor],
    stop_token: int | None,
) -> list[list[int]]:
    following = Piece.written_after if model.config.encoder_decoder else Piece.after
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    for step in range(max_new_tokens):
        for piece in pieces:
            logits_BV = model(piece, cache, wants_logits=True)[:, -1].float()
        if step == 0:  # the prompt runs once and is shared
            cache.repeat(num_samples)
            logits_BV = logits_BV.repeat(num_samples, 1)
        next_B = choose(logits_BV)
        if _extend(samples, next_B, stop_token):
            break
        pieces = iter([following(cache, next_B[:, None])])
    return samples


def _extend(samples: list[list[int]], next_B: Tensor, stop_token: int | None) -> bool:
    """The samples that have not stopped get their next token; whether all have stopped now."""
    for sample, token in zip(samples, next_B.tolist(), strict=True):
        if not sample or sample[-1] != stop_token:
            sample.append(token)
    return all(sample[-1] == stop_token for sample in samples)


def _problems(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
) -> list[str]:
    """Everything about the arguments of `generate` that cannot work, one text each."""
    config, found = model.config, []
    assert config.vocab_size is not None, "a built model has a vocabulary"
    if not prompt_tokens:
        found.append("the prompt is empty; give at least one token (for example the tokenizer's end of document)")
    elif min(prompt_tokens) < 0 or max(prompt_tokens) >= config.vocab_size:
        found.append(
            f"prompt token ids {min(prompt_tokens)} to {max(prompt_tokens)} must lie in "
            f"[0, vocab_size={config.vocab_size}); encode the prompt with the model's own tokenizer"
        )
    if max_new_tokens < 0 or num_samples < 1:
        found.append(f"max_new_tokens={max_new_tokens} must be at least 0 and num_samples={num_samples} at least 1")
    if not 0.0 <= temperature < math.inf or top_k < 0 or not 0.0 < top_p <= 1.0:
        found.append(
            f"temperature={temperature} must be at least 0, top_k={top_k} at least 0 (0 keeps all tokens), "
            f"top_p={top_p} in (0, 1]"
        )
    length, limit = len(prompt_tokens) + max_new_tokens, config.max_position_embeddings
    if config.position_embedding_type == "learned_absolute" and limit is not None and length > limit:
        found.append(
            f"prompt of {len(prompt_tokens)} tokens + max_new_tokens={max_new_tokens} exceeds the "
            f"max_position_embeddings={limit} learned positions; shorten the prompt or ask for at most "
            f"{max(0, limit - len(prompt_tokens))} new tokens"
        )
    return found
