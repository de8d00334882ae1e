"""Embedding, output head, loss and draws over a vocabulary whose rows are spread: no rank sees a whole row of logits.

The rows of the padded vocabulary are dealt out in equal runs by rank. Shapes: B batch, T sequence, N tokens, D model
width, V this rank's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.distributed.functional import all_gather, all_gather_from_region, all_reduce, regathered
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.kernels.divergence import Spread, forward_kl
from megalm.models.blocks.embedding import EmbeddingTable
from megalm.models.blocks.head import FullLogits, HeadUse, OutputHead, TiedHead, TokenLoss
from megalm.models.blocks.sampling import TokenSampler
from megalm.parallel.region import TensorParallel
from megalm.parallel.tensor import linear_with_async_grad_comm


class VocabParallelEmbedding(nn.Module):
    """Embedding of which each rank holds a run of rows; the sum over the ranks leaves the region."""

    def __init__(self, tp: TensorParallel, rows: int, width: int) -> None:
        super().__init__()
        assert rows % tp.size == 0, f"{rows} padded rows are a multiple of {tp.size} ranks"
        self.weight = EmbeddingTable(rows // tp.size, width).weight
        self.tp = tp
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The rows of `tokens_BT` (B, T, D), as they stand outside the region."""
        rows = self.weight.shape[0]
        local_BT = tokens_BT - self.tp.rank * rows
        elsewhere_BT = (local_BT < 0) | (local_BT >= rows)
        x_BTD = self.kernels.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return self.tp.from_region(x_BTD.masked_fill(elsewhere_BT[..., None], 0.0))


class VocabParallelHead(OutputHead):
    """The output head of which each rank holds a run of rows; its input has entered the region."""

    def forward(
        self, x_BTD: Tensor, use: HeadUse = linear_with_async_grad_comm, bias_V: Tensor | None = None
    ) -> Tensor:
        """This rank's columns of the logits (B, T, V), or what `use` makes of hidden states, weight and bias."""
        return super().forward(x_BTD, use, bias_V)


class VocabParallelTiedHead(TiedHead):
    """The tied head of which each rank holds a run of rows; its input has entered the region."""

    def forward(
        self,
        x_BTD: Tensor,
        embedding: nn.Module,
        use: HeadUse = linear_with_async_grad_comm,
        bias_V: Tensor | None = None,
    ) -> Tensor:
        """This rank's columns of the logits (B, T, V), or what `use` makes of hidden states, weight and bias."""
        return super().forward(x_BTD, embedding, use, bias_V)


class VocabParallelTokenLoss(TokenLoss):
    """Cross entropy of each token over the ranks' logits, in float32, equal on all ranks."""

    def __init__(self, tp: TensorParallel, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.tp = tp

    def of_logits(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Losses (B, T) of this rank's columns of the logits."""
        own_BT, classes = labels_BT - self.tp.rank * logits_BTV.shape[-1], self._classes(logits_BTV)
        return vocab_parallel_cross_entropy(logits_BTV, own_BT, classes, self.tp.group, self.kernels)

    def divergence(self, logits_BTV: Tensor, teacher_BTV: Tensor, temperature: float, top_k: int | None) -> Tensor:
        """As of a whole vocabulary, from this rank's columns of both; no rank sees a whole row."""
        spread = Spread(
            maximum=partial(all_reduce, group=self.tp.group, op=dist.ReduceOp.MAX),
            total=partial(all_reduce, group=self.tp.group),
            joined=partial(all_gather, group=self.tp.group, dim=-1),
        )
        return forward_kl(logits_BTV, teacher_BTV, self._classes(logits_BTV), temperature, top_k, spread)

    def _classes(self, logits_BTV: Tensor) -> int:
        """How many of this rank's columns are no padding."""
        columns = logits_BTV.shape[-1]
        return min(max(self.vocab_size - self.tp.rank * columns, 0), columns)

    def of_hidden_states(
        self, labels_BT: Tensor, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None
    ) -> Tensor:
        """Losses (B, T) of the logits x weight^T + bias, a part of whose columns exists at a time.

        Communicated as with logits: three numbers a token. An `x_BTD` that was gathered is gathered again in the
        backward pass, where its gradient is Partial: that of this rank's rows.
        """
        source = regathered(x_BTD)
        losses_N = self.kernels.linear_cross_entropy(
            x_BTD.flatten(0, 1),
            weight_VD,
            labels_BT.flatten(),
            self.vocab_size,
            bias_V=bias_V,
            first=self.tp.rank * len(weight_VD),
            merge=partial(_over_ranks, self.tp.group),
            again=None if source is None else lambda: source.begin_and_take().flatten(0, 1),
        )
        return losses_N.view(labels_BT.shape)


class VocabParallelTokenSampler(TokenSampler):
    """Draws tokens from logits whose columns are spread: two numbers a token are reduced, and all ranks have its id."""

    def __init__(self, tp: TensorParallel, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.tp = tp

    @torch.no_grad()
    def forward(self, logits_NV: Tensor, seeds_N: Tensor, places_N: Tensor) -> Tensor:
        """Token ids [N], from this rank's columns of the logits."""
        values_N, ids_N = self.largest(logits_NV, seeds_N, places_N, first=self.tp.rank * logits_NV.shape[-1])
        largest_N = all_reduce(values_N, self.tp.group, dist.ReduceOp.MAX)
        ids_N = ids_N.masked_fill(values_N < largest_N, torch.iinfo(ids_N.dtype).max)
        return all_reduce(ids_N, self.tp.group, dist.ReduceOp.MIN)


class GatheredLogits(FullLogits):
    """Logits of the whole vocabulary on every rank, for generation; training never calls it."""

    def __init__(self, tp: TensorParallel, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.tp = tp

    def forward(self, logits_BTV: Tensor) -> Tensor:
        """Logits (B, T, padded vocabulary), padding set to -inf."""
        return super().forward(all_gather_from_region(logits_BTV, self.tp.group, dim=-1))


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, num_classes: int, group: ProcessGroup, kernels: Kernels = REFERENCE
) -> Tensor:
    """-log softmax(all ranks' logits)[label] of every token, float32, shape of `labels`, equal on all ranks.

    `logits` (..., V) are this rank's columns, any float dtype, of which the first `num_classes` are real and the rest
    vocabulary padding: no probability, gradient exactly zero. `labels` (...) count from this rank's first column; they
    lie outside [0, num_classes) where another rank has the label's column.

    Communicated: one maximum, one sum of exponentials and one logit a token. Saved for backward: the logits as they
    are, the labels and the log of the normalizer. The gradient has the dtype of the logits and is computed in float32;
    the fused kernels write it over the logits, which nobody may read after the backward.
    Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    flat_NV = logits.reshape(-1, logits.shape[-1])
    return apply(flat_NV, labels.reshape(-1), num_classes, group, kernels).view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Forward: per-row loss, with two reductions. Backward: (softmax - one hot) x incoming gradient, no reduction."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, num_classes: int, group: ProcessGroup, kernels: Kernels
    ) -> Tensor:
        statistics = kernels.vocabulary_statistics(logits_NV, labels_N, 0, num_classes)
        normalizer_N, target_N = _over_ranks(group, *statistics)
        ctx.save_for_backward(logits_NV, labels_N, normalizer_N)
        ctx.num_classes, ctx.kernels = num_classes, kernels
        return normalizer_N - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, normalizer_N = ctx.saved_tensors
        scale_N = grads[0].contiguous()
        grad_NV = ctx.kernels.vocabulary_gradient(logits_NV, labels_N, normalizer_N, scale_N, 0, ctx.num_classes)
        return grad_NV, None, None, None, None


def _over_ranks(group: ProcessGroup, largest_N: Tensor, sum_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of the ranks' columns to (log of the normalizer, label's logit) over all of them."""
    maximum_N = all_reduce(largest_N, group, dist.ReduceOp.MAX)
    # a rank of padding alone has no largest logit (-inf): its sum is zero times whatever
    scaled_N = sum_N * (largest_N - maximum_N).exp()
    sums_2N = all_reduce(torch.stack((scaled_N, target_N)), group)
    return maximum_N + sums_2N[0].log(), sums_2N[1]
