"""Tokens drawn from a model's own distribution, the same in every layout.

What is drawn at a position follows from the seed of its sample, its place in it and the token's id, by a counter-based
generator: no state, so that any rank draws its columns of the vocabulary and any split of a batch its rows.
Shapes: N positions, V padded vocabulary.
"""

import torch
from torch import Tensor, nn

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1
_ELEMENTS = 1 << 22
"""Logits that noise is added to at a time."""


class TokenSampler(nn.Module):
    """Draws a token of each row of logits by the Gumbel-max trick: argmax of logit - log(-log(u)).

    The argmax of sums changes only where the two largest are equal but for rounding, which differs between layouts. The
    inverse of a distribution function would change with every sum below it.
    Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030, section 2.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    @torch.no_grad()
    def forward(self, logits_NV: Tensor, seeds_N: Tensor, places_N: Tensor) -> Tensor:
        """Token ids [N], never of the padding, for positions `places_N` of samples with these seeds (int64)."""
        return self.largest(logits_NV, seeds_N, places_N, first=0)[1]

    def largest(self, logits_NV: Tensor, seeds_N: Tensor, places_N: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The largest of noise + logits [N] and its id [N], of the columns of the ids from `first` on."""
        keys_N = position_keys(seeds_N, places_N)
        ids_V = torch.arange(first, first + logits_NV.shape[1], device=logits_NV.device)
        rows = max(1, _ELEMENTS // logits_NV.shape[1])
        found = []
        for start in range(0, max(1, len(keys_N)), rows):
            part = slice(start, start + rows)
            noisy = gumbel_noise(keys_N[part], ids_V).add_(logits_NV[part].float())
            found.append(noisy.masked_fill_(ids_V >= self.vocab_size, float("-inf")).max(dim=1))
        values_N = torch.cat([part.values for part in found])
        return values_N, torch.cat([part.indices for part in found]) + first


def position_keys(seeds_N: Tensor, places_N: Tensor) -> Tensor:
    """32 random bits, int32 [N], for each position of a sample."""
    keys_N = _mixed(_as_int32(seeds_N & _LOW) ^ _as_int32(places_N * _GOLDEN & _LOW))
    return _mixed(keys_N ^ _as_int32(seeds_N >> 32))


def gumbel_noise(keys_N: Tensor, ids_V: Tensor) -> Tensor:
    """Standard Gumbel numbers, float32 [N, V], of the ids at the positions with these keys.

    -log(-log(1 - u)) with u in (0, 1], fine where u is small: that is where the noise is large enough to matter.
    """
    bits_NV = _mixed(_as_int32(ids_V * _GOLDEN & _LOW) ^ keys_N[:, None])
    uniform_NV = bits_NV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return uniform_NV.neg_().log1p_().neg_().log_().neg_()


def _as_int32(x: Tensor) -> Tensor:
    """The low 32 bits, which lie in [0, 2^32), as an int32."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """Each int32 mapped to another, all bits depending on all. Source: Wellons, hash-prospector, `lowbias32`."""
    x = x ^ _shifted(x, 16)
    x = x.mul_(0x7FEB352D)
    x ^= _shifted(x, 15)
    x = x.mul_(0x846CA68B - (1 << 32))
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros from the left."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
