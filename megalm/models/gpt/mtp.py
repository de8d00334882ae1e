"""Multi-token prediction: modules behind a decoder that predict tokens further ahead, one after the other.

Shapes: B batch, T sequence, N = T + 1 room for cumulative document lengths, D model width.
Source: DeepSeek-V3, arXiv:2412.19437, section 2.2; Megatron-LM, multi_token_prediction.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.norm import build_norm
from megalm.models.contract import Batch


class PredictionModule(nn.Module):
    """Module k: norm(layer(W [norm(embedding of token i + k); norm(h_i of depth k - 1)])), for h_i of depth k.

    h of depth 0 are the hidden states that the output head reads, which h of every depth goes to as well.
    """

    def __init__(self, config: ModelConfig, layer: nn.Module) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding_norm = build_norm(config, width)
        self.hidden_norm = build_norm(config, width)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.layer = layer
        self.final_norm = build_norm(config, width)

    def forward(self, h_BTD: Tensor, ahead_BTD: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """h (B, T, D) of this depth; `ahead_BTD` are the embeddings, and `run` takes a stream through a layer."""
        joined = torch.cat((self.embedding_norm(ahead_BTD), self.hidden_norm(h_BTD)), dim=-1)
        y_BTD: Tensor = self.final_norm(run(self.layer, self.projection(joined)))
        return y_BTD


def shifted(x_BT: Tensor, depth: int) -> Tensor:
    """What stands `depth` positions further on, (B, T); 0 past the end."""
    return F.pad(x_BT[:, depth:], (0, depth))


def weights_ahead(batch: Batch, depth: int) -> Tensor:
    """The weight (B, T) of the label that is `depth` positions further on: 0 past the end of the row or document."""
    weights_BT, cu_seqlens_BN = shifted(batch["loss_mask"], depth), batch.get("cu_seqlens")
    if cu_seqlens_BN is None:
        return weights_BT
    B, T = weights_BT.shape
    places_BT = torch.arange(T, dtype=cu_seqlens_BN.dtype, device=cu_seqlens_BN.device).expand(B, T).contiguous()
    documents_BT = torch.searchsorted(cu_seqlens_BN.contiguous(), places_BT, right=True)
    is_same_BT = shifted(documents_BT, depth) == documents_BT
    return weights_BT * is_same_BT.to(weights_BT.device, non_blocking=True)
