"""AdamW and the norm of gradients, over lists of tensors."""

import pytest
import torch
from kernels.fused import DTYPES, needs_fused, on_copies, opcheck

from megalm.kernels.optimizer import adamw_step, fused_adamw_step, fused_l2_norm, l2_norm


@on_copies(model_dtype=[None, torch.bfloat16], grad_dtype=DTYPES)
def test_adamw_steps(model_dtype, grad_dtype):
    shapes = [(3,), (70000,), (5, 9), (0,)] + [(17,)] * 60  # more than one launch takes
    states = []
    for step in (fused_adamw_step, adamw_step):
        torch.manual_seed(1)
        masters = [torch.randn(shape) for shape in shapes]
        moments = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
        models = [master.to(model_dtype) for master in masters] if model_dtype else []
        for number in (1, 2, 3):
            grads = [torch.randn(shape).to(grad_dtype) for shape in shapes]
            options = {"factor": 0.3, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            step(masters, *moments, grads, models, **options, step=number)
        states.append((masters, *moments, models))
    for fused, reference in zip(*states, strict=True):
        for result, expected in zip(fused, reference, strict=True):
            tolerance = 2e-5 if result.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=2e-6)


@on_copies()
def test_l2_norm():
    tensors = [torch.randn(70001), torch.randn(3, 5).bfloat16(), torch.randn(0), 100 * torch.randn(9).half()]
    tensors += [torch.randn(33) for _ in range(60)]
    torch.testing.assert_close(fused_l2_norm(tensors), l2_norm(tensors), rtol=1e-6, atol=0)


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    lists = [[torch.rand(5), torch.rand(3, 2)] for _ in range(4)]
    opcheck("adamw_", *lists, [t.bfloat16() for t in lists[0]], 1.0, 0.1, 0.9, 0.9, 1e-8, 0.1, 1)
    opcheck("square_sum", lists[0])
