"""torch's own checks of the operators: schema, fake implementation, autograd, dynamic shapes; and torch.compile."""

import pytest
import torch
from kernels.fused import ON_GPU, gpu, needs_fused

from megalm.kernels.activation import fused_swiglu
from megalm.kernels.attention import own_kernel_runs
from megalm.kernels.cross_entropy import fused_cross_entropy
from megalm.kernels.norm import fused_rms_norm_after_add
from megalm.kernels.rotary import rotary_tables

pytestmark = needs_fused


def samples():
    """(operator, arguments) of every operator of the schema."""
    x, y, w = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, requires_grad=True)
    mean, rstd, logits = torch.zeros(6), torch.ones(6), torch.randn(6, 8, requires_grad=True)
    labels = torch.arange(6)
    lse, scale, seed = logits.detach().logsumexp(-1), torch.ones(6), torch.tensor([5])
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 2, 8)
    tables = rotary_tables(torch.arange(3)[None], 8, 100.0)
    scores, documents = torch.randn(2, 2, 3, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    heads = [torch.randn(2, 3, n, 16).bfloat16().requires_grad_() for n in (4, 2, 2)]
    plain = [t.detach().clone() for t in (x, y, w)]
    lists = [[torch.rand(5), torch.rand(3, 2)] for _ in range(4)]
    return [
        ("norm", (x, None, weight, weight, 1e-5, True)),
        ("norm", (x, y, weight, None, 1e-5, False)),
        ("norm_backward", (*plain[:2], plain[2], weight.detach(), mean, rstd, True, True)),
        ("rotary", (q, *tables, False)),
        ("rotary_", (q.detach().clone(), k, *tables, True)),
        ("gated_activation", (x, y, 0)),
        ("gated_activation_backward", (*plain, 1)),
        ("bias_activation", (x, weight, 2)),
        ("bias_activation_backward", (*plain[:2], None, 3)),
        ("cross_entropy", (logits.detach(), labels, 0, 7, True)),
        ("cross_entropy_backward", (logits.detach(), labels, lse, scale, 0, 7, 0.1)),
        ("cross_entropy_backward_", (logits.detach().clone(), labels, lse, scale, 0, 7, 0.1)),
        ("bias_dropout_add", (x, weight, y, seed, 0.5, 3, 3, 0)),
        ("bias_dropout_add", (x, None, None, seed, 0.5, 3, 6, 3)),
        ("embedding_backward", (logits.detach(), labels, labels, 9)),
        ("adamw_", (*lists[:3], lists[3], [t.bfloat16() for t in lists[0]], 1.0, 0.1, 0.9, 0.9, 1e-8, 0.1, 1)),
        ("square_sum", (lists[0],)),
        ("scale_", (lists[0], 0.5)),
        ("softmax", (scores, None, documents, documents, 0.5, True)),
        ("softmax_backward", (scores.detach(), scores.detach(), 0.5)),
        ("attention", (*heads, 0.25)),
        ("attention_backward", (*(x.detach() for x in (heads[0], *heads, heads[0])), torch.zeros(2, 4, 3), 0.25)),
    ]


NAMES = [name for name, _ in samples()]


@pytest.fixture(params=["CPU", pytest.param("CUDA", marks=ON_GPU)])
def _device(request):
    if request.param == "CPU":
        yield
        return
    with gpu():
        yield


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_opcheck(number):
    name, arguments = samples()[number]
    if name.startswith("attention") and (arguments[0].is_cuda or not own_kernel_runs()):
        pytest.skip("our attention is for CPUs with AVX-512 and bfloat16")
    torch.library.opcheck(getattr(torch.ops.megalm, name).default, arguments)


def test_every_operator_of_the_schema_is_checked():
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megalm::")}
    assert defined == {f"megalm::{name}" for name in NAMES}


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
