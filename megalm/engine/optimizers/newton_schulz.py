"""The orthogonal factor of a matrix by Newton and Schulz's iteration, also of one whose shards lie on several ranks.

For G = U S V^T it gives about U V^T: x <- a x + (b A + c A^2) x with A = x x^T, from x = G / |G|. bf16 on GPUs, as
torch's Muon; fp32 elsewhere.
"""

import math
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan's and torch's: steepest at zero; singular values come out between 0.7 and 1.2
    "simple": ((3.4445, -4.7750, 2.0315),),
    # Cesista et al. 2025, https://leloykun.github.io/ponder/muon-opt-coeffs: a set for each of five steps
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
_EPSILON = 1e-7


def orthogonal_factor(
    matrix: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    steps: int,
    *,
    dim: int | None = None,
    group: ProcessGroup | None = None,
    counted: bool = True,
) -> Tensor:
    """The orthogonal factor of an fp32 matrix, fp32.

    With `group`, `matrix` is this rank's shard of a matrix that is cut in `dim`, and so is the result: a step sums the
    products x x^T over the group. Of ranks that hold the same shard, one is `counted`.
    """
    wide = matrix.shape[0] <= matrix.shape[1] if group is None else dim == 1
    x = matrix if wide else matrix.T

    def summed(product: Tensor) -> Tensor:
        if group is not None:
            product = product if counted else torch.zeros_like(product)
            dist.all_reduce(product, group=group)
        return product

    x = x / summed(x.square().sum()).sqrt().clamp(min=_EPSILON)
    x = x.bfloat16() if x.is_cuda else x
    for a, b, c in islice(cycle(coefficients), steps):
        gram = summed(x @ x.T)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).float()


def update_scale(shape: Sequence[int], mode: Literal["spectral", "unit_rms_norm", "shape_scaling"]) -> float:
    """By what an orthogonal update of this shape (outputs, inputs) is multiplied.

    `spectral`: root of the larger size (Liu et al. 2025, arXiv:2502.16982, who multiply by 0.2 more); `unit_rms_norm`:
    root of outputs / inputs (Pethick et al. 2025, arXiv:2502.07529); `shape_scaling`: the same, at least 1 (Jordan).
    """
    rows, columns = shape
    if mode == "spectral":
        return math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns if mode == "unit_rms_norm" else max(1.0, rows / columns))
