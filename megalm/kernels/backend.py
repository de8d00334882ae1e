"""The functions that a model calls: the references, or the fused ones. Chosen once, when a model is built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megalm.kernels import activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary
from megalm.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of every operator that the models call, with the signatures of the references."""

    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = norm.layer_norm
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = norm.rms_norm
    layer_norm_after_add: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        norm.layer_norm_after_add
    )
    rms_norm_after_add: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] = (
        norm.rms_norm_after_add
    )
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary.apply_rotary
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention.causal_attention
    gelu: Callable[[Tensor], Tensor] = activation.gelu
    gelu_tanh: Callable[[Tensor], Tensor] = activation.gelu_tanh
    squared_relu: Callable[[Tensor], Tensor] = activation.squared_relu
    swiglu: Callable[[Tensor, Tensor], Tensor] = activation.swiglu
    vocabulary_statistics: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = (
        cross_entropy.vocabulary_statistics
    )
    vocabulary_gradient: Callable[..., Tensor] = cross_entropy.vocabulary_gradient
    """As `cross_entropy.vocabulary_gradient`; the fused one writes over the logits."""
    cross_entropy: Callable[[Tensor, Tensor, int], Tensor] = cross_entropy.cross_entropy
    linear_cross_entropy: Callable[..., Tensor] = linear_cross_entropy
    embedding: Callable[[Tensor, Tensor], Tensor] = embedding.embedding
    dropout_add: Callable[[Tensor, Tensor | None, float, tuple[int, int]], Tensor] = dropout.dropout_add
    l2_norm: Callable[[Sequence[Tensor]], Tensor] = optimizer.l2_norm
    adamw_step: Callable[..., None] | None = None
    """As `optimizer.adamw_step`; None: torch's own fused AdamW."""
    sharded_adamw: bool = False
    """Whether `adamw_step` serves the parts of ZeRO 1 to 3 too, which have no master apart; else torch's own does."""


REFERENCE = Kernels()


def _training_cross_entropy(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return cross_entropy.fused_cross_entropy(logits, labels, num_classes, in_place=logits.requires_grad)


FUSED = Kernels(
    layer_norm=norm.fused_layer_norm,
    rms_norm=norm.fused_rms_norm,
    layer_norm_after_add=norm.fused_layer_norm_after_add,
    rms_norm_after_add=norm.fused_rms_norm_after_add,
    rotary=rotary.fused_rotary,
    attention=attention.fused_causal_attention,
    gelu=activation.fused_gelu,
    gelu_tanh=activation.fused_gelu_tanh,
    squared_relu=activation.fused_squared_relu,
    swiglu=activation.fused_swiglu,
    cross_entropy=_training_cross_entropy,
    vocabulary_statistics=cross_entropy.fused_vocabulary_statistics,
    vocabulary_gradient=cross_entropy.fused_vocabulary_gradient_,
    linear_cross_entropy=partial(linear_cross_entropy, fused=True),
    embedding=embedding.fused_embedding,
    dropout_add=dropout.fused_dropout_add,
    l2_norm=optimizer.fused_l2_norm,
    adamw_step=optimizer.fused_adamw_step,
)
"""The loss's gradient is written over the logits, which are the model's own."""
