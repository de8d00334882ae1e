"""What holds for all operators: each has torch's own checks in its test; and torch.compile."""

from pathlib import Path

import pytest
import torch
from kernels.fused import needs_fused

from megalm.kernels.activation import fused_swiglu
from megalm.kernels.cross_entropy import fused_cross_entropy
from megalm.kernels.norm import fused_rms_norm_after_add

pytestmark = needs_fused


def test_every_operator_is_checked_by_torch():
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megalm::")}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert defined
    assert [name for name in defined if f'opcheck("{name.removeprefix("megalm::")}",' not in tests] == []


@pytest.mark.usefixtures("_device")
def test_compiled_whole_graph_gives_the_same_numbers():
    def block(x, residual, weight, labels):
        y, total = fused_rms_norm_after_add(x, residual, weight, 1e-5)
        return fused_cross_entropy(fused_swiglu(y, total), labels, 7).sum()

    inputs = [torch.randn(6, 8).requires_grad_() for _ in range(2)] + [torch.randn(8).requires_grad_()]
    labels = torch.arange(6)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        for x in inputs:
            x.grad = None
        loss = function(*inputs, labels)
        loss.backward()
        results.append([loss.detach()] + [x.grad for x in inputs])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
