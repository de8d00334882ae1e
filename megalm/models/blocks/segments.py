"""Segment recurrence, and attention with relative positions that goes with it (Transformer-XL).

Shapes: B micro-batch, T positions of a segment, M of its memory, S = M + T keys, D model width, H heads that this
device holds, C head width.
Source: Dai et al. 2019, "Transformer-XL", arXiv:1901.02860, sections 3.2 and 3.3.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.attention import Attention
from megalm.models.blocks.bidirectional import Within
from megalm.models.blocks.relative import UnscaledAttention
from megalm.models.blocks.windows import visible_keys


class SegmentMemory:
    """What the layers of a model have read at the last `size` positions before the next segment of B texts.

    `layers` has it by layer number, (B, M, D) each, without gradient: nothing before the first segment, then M = T,
    2 T, ... up to `size`.
    """

    def __init__(self, size: int, layers: Mapping[int, Tensor] | None = None) -> None:
        self.size = size
        self.layers = dict(layers or {})

    def positions(self, x_BTD: Tensor) -> Tensor:
        """Positions (1, S) of memory and segment; of rotary ones only their distances count."""
        before = max((layer.shape[1] for layer in self.layers.values()), default=0)
        return torch.arange(before + x_BTD.shape[1], device=x_BTD.device)[None]

    def layer(self, number: int) -> "LayerMemory":
        """One layer's, for the pass of one segment."""
        return LayerMemory(self.size, self.layers.get(number))

    def advance(self, layers: Mapping[int, Tensor]) -> None:
        """Go on to the next segment, before which `layers` have read this."""
        self.layers = dict(layers)


class LayerMemory:
    """What one layer has read before a segment; a second pass over it, as recomputation makes it, is the same."""

    def __init__(self, size: int, before_BMD: Tensor | None) -> None:
        self._size, self._before = size, before_BMD
        self._after: Tensor | None = None

    def extended(self, x_BTD: Tensor) -> Tensor:
        """[memory, x] (B, S, D); gradients go to x alone (section 3.2: h~ = [SG(m), h])."""
        seen_BSD = x_BTD if self._before is None else torch.cat((self._before, x_BTD), dim=1)
        self._after = seen_BSD.detach()[:, -self._size :].clone()  # no view, which would hold the whole segment
        return seen_BSD

    @property
    def after(self) -> Tensor:
        """What the layer has read before the next segment; the layer has run."""
        assert self._after is not None, "the layer has run"
        return self._after


class RelativeTerms(nn.Module):
    """The terms of the scores of query i and key j that are not q_i k_j alone, as in section 3.3:

    score = (q_i + u) . k_j + (q_i + v) . W R_(i - j), over sqrt(C)

    with R the sinusoids of a distance. u (`content_bias`), v (`distance_bias`) and W (`projection`) are of each layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        self.projection = nn.Parameter(torch.empty(width, config.hidden_size))
        self.content_bias = nn.Parameter(torch.empty(width))
        self.distance_bias = nn.Parameter(torch.empty(width))
        self.scale = config.softmax_scale

    def forward(self, q_BTHC: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(queries (B, T, H, C) for q . k, what is added to these scores (B, H, T, S): -inf for keys after the query).

        S is `length`, and the queries are its last T positions.
        """
        T, C = q_BTHC.shape[1], q_BTHC.shape[3]
        R_SD = sinusoids(length, self.projection.shape[1], q_BTHC.device).to(q_BTHC.dtype)
        r_SHC = F.linear(R_SD, self.projection).view(length, -1, C)
        by_distance = torch.einsum("bthc,shc->bhts", q_BTHC + self.distance_bias.view(-1, C), r_SHC)
        terms_BHTS = shifted(by_distance) * self.scale
        visible = visible_keys(T, length, None, q_BTHC.device)
        if visible is not None:
            terms_BHTS = terms_BHTS.masked_fill(~visible, float("-inf"))
        return (q_BTHC + self.content_bias.view(-1, C)) * self.scale, terms_BHTS


class RelativeAttention(Attention):
    """Attention whose scores know distances by `RelativeTerms`."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer, UnscaledAttention(config.attention_dropout))
        self.relative = RelativeTerms(config)

    def _mixed(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, documents: Within) -> Tensor:
        assert documents is None, "memory and positions know no documents"
        q_BTHC, terms_BHTS = self.relative(q_BTHC, k_BSGC.shape[1])
        y_BTHC: Tensor = self.core(q_BTHC, k_BSGC, v_BSGC, terms_BHTS)
        return y_BTHC


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """A decoder's attention with the positions that the configuration names."""
    kind = RelativeAttention if config.position_embedding_type == "relative" else Attention
    return kind(config, layer)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """The sines, then the cosines, of the distances length - 1, ..., 1, 0: float32 (S, D)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    distances_S = torch.arange(length - 1, -1, -1, dtype=torch.float32, device=device)
    angles = distances_S[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


def shifted(by_distance: Tensor) -> Tensor:
    """By query and key (B, H, T, S) what is given by query and distance, the largest first; keys after the query: any.

    Row t moves T - 1 - t places to the left, all at once (appendix B).
    """
    B, H, T, S = by_distance.shape
    return F.pad(by_distance, (1, 0)).view(B, H, S + 1, T)[:, :, 1:].reshape(B, H, T, S)
