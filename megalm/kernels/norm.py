"""Layer and root-mean-square normalization of the last dim, with float32 statistics for every input dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim; shape and dtype of `x`.

    Mean, variance, scale and shift are computed in float32 and rounded once at the end.
    `weight` and `bias` have shape (x.shape[-1],); their dtype may differ from x's.
    Source: Ba et al. 2016, "Layer Normalization", equation 4.
    """
    if weight.dtype == x.dtype:  # torch's own kernel already keeps float32 inside
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight.float(), shift, epsilon).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim; shape and dtype of `x`.

    The mean square, the division and the scale are computed in float32 and rounded once at the end.
    `weight` has shape (x.shape[-1],); its dtype may differ from x's.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    # through one node, so that x gets one gradient, summed here: the same whether or not the norm is recomputed
    wide = x.view_as(x).to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)
