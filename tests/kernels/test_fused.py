"""Every fused operator against its reference in float64: values and gradients, each dtype and instruction set."""

import pytest
import torch
import torch.nn.functional as F
from kernels import emulated
from kernels.fused import DTYPES, LOADED, ON_GPU, TOLERANCE, check, gpu, leaf, needs_fused
from torch.utils.flop_counter import FlopCounterMode

from megalm.kernels import library
from megalm.kernels.activation import (
    Activation,
    bias_activation,
    fused_bias_activation,
    fused_geglu,
    fused_swiglu,
    geglu,
    swiglu,
)
from megalm.kernels.cross_entropy import (
    fused_cross_entropy,
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient,
    vocabulary_statistics,
)
from megalm.kernels.dropout import bias_dropout_add, fused_bias_dropout_add
from megalm.kernels.embedding import embedding, fused_embedding
from megalm.kernels.linear_cross_entropy import linear_cross_entropy, summed_linear_cross_entropy
from megalm.kernels.norm import (
    fused_layer_norm,
    fused_layer_norm_after_add,
    fused_rms_norm,
    fused_rms_norm_after_add,
    layer_norm,
    layer_norm_after_add,
    rms_norm,
    rms_norm_after_add,
)
from megalm.kernels.optimizer import adamw_step, fused_adamw_step, fused_l2_norm, fused_scale_tensors, l2_norm
from megalm.kernels.rotary import apply_rotary, fused_rotary, fused_rotary_, rotary_tables
from megalm.kernels.softmax import fused_masked_softmax, masked_softmax

pytestmark = needs_fused
SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 33), (0, 8), (67, 129)]
# of a row a GPU's thread holds 1 or 2 packs of 16 bytes in the backward of a norm, or none: in float32 that is the last
WIDE = [(3, 520), (2, 3000), (2, 6200)]

WIDEST = 99  # more than there are
COPIES = {
    "AVX-512-bf16": 3,
    "AVX-512": 2,
    "AVX2": 1,
    "generic": 0,
    "CUDA-emulated": "emulated",
    "CUDA": pytest.param("cuda", marks=ON_GPU),
}


@pytest.fixture(params=COPIES.values(), ids=COPIES.keys(), autouse=True)
def _kernels(request):
    """Runs each test on every copy of the kernels that this machine can execute, and on the CUDA sources, emulated."""
    if request.param == "cuda":
        with gpu():
            yield
        return
    if request.param == "emulated":
        with emulated.live(LOADED.path, request.getfixturevalue("emulated_kernels")):
            yield
        return
    if library.instruction_set(LOADED.path, request.param) != request.param:
        library.instruction_set(LOADED.path, WIDEST)
        pytest.skip("this processor has no such instructions")
    yield
    library.instruction_set(LOADED.path, WIDEST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_norms(shape, dtype):
    x, residual = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    weight, bias = leaf(shape[-1]), leaf(shape[-1])
    # a row of one element has no variance: its gradient is a difference of rounding errors over sqrt(epsilon)
    epsilon = 1e-2 if shape[-1] < 4 else 1e-5
    loose = 20 * TOLERANCE[torch.float32] if dtype == torch.float32 else None
    check(
        lambda x, w: fused_rms_norm(x, w, epsilon), lambda x, w: rms_norm(x, w, epsilon), (x, weight), tolerance=loose
    )
    x.grad = weight.grad = None
    check(
        lambda x, w, b: fused_layer_norm(x, w, b, epsilon),
        lambda x, w, b: layer_norm(x, w, b, epsilon),
        (x, weight, bias),
        tolerance=loose,
    )
    for fused, reference, arguments in [
        (fused_rms_norm_after_add, rms_norm_after_add, (weight,)),
        (fused_layer_norm_after_add, layer_norm_after_add, (weight, bias)),
    ]:
        with torch.no_grad():
            _, total = fused(x, residual, *arguments, epsilon)
        assert torch.equal(total, x + residual)
        # x + x is exact: the sum is rounded before it is normalized, float64 would not
        inputs = [t.detach().clone().requires_grad_() for t in (x, x, *arguments)]
        check(lambda *a, f=fused: f(*a, epsilon), lambda *a, f=reference: f(*a, epsilon), inputs, tolerance=loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_wider_than_a_team_of_threads_holds(dtype):
    """On GPUs these take loops that narrower rows leave out."""
    loose = 20 * TOLERANCE[torch.float32] if dtype == torch.float32 else None
    x, weight, bias = leaf(2, 16400, dtype=dtype), leaf(16400), leaf(16400)
    check(lambda *a: fused_layer_norm(*a, 1e-5), lambda *a: layer_norm(*a, 1e-5), (x, weight, bias), tolerance=loose)
    for columns in (20000, 20003):
        logits, labels = leaf(2, columns, dtype=dtype), torch.tensor([19990, 7])
        check(
            lambda x, labels=labels: fused_cross_entropy(x, labels, 19997),
            lambda x, labels=labels: F.cross_entropy(x[:, :19997], labels, reduction="none"),
            (logits,),
            tolerance=loose,
        )
    scores = leaf(1, 1, 2, 16400, dtype=dtype)
    check(
        lambda x: fused_masked_softmax(x, 0.5, causal=True),
        lambda x: masked_softmax(x, 0.5, causal=True),
        (scores,),
        tolerance=loose,
    )


def test_norms_of_a_large_mean_and_of_strided_heads():
    x = (torch.randn(2, 3, 4, 16) + 30).bfloat16()
    wide = torch.randn(2, 3, 12, 16).bfloat16()
    weight, bias = torch.randn(16), torch.randn(16)
    for value in (x, wide[:, :, 4:8], wide.transpose(1, 2)):
        expected = layer_norm(value.double(), weight.double(), bias.double(), 1e-5)
        result = fused_layer_norm(value, weight, bias, 1e-5)
        torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "turned"), [(3, 64, 64), (1, 38, 34), (2, 5, 2)])
def test_rotary(heads, width, turned, dtype):
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 7, 8, 9]])  # a document ends in the first row
    tables = rotary_tables(positions, turned, 100.0)
    x = leaf(2, 5, heads, width, dtype=dtype)
    check(lambda x: fused_rotary(x, *tables), lambda x: apply_rotary(x, *(t.double() for t in tables)), (x,))
    shared = tuple(table[:1] for table in tables)
    q = torch.randn(2, 5, 4 * heads, width).to(dtype)[:, :, ::2]  # strided: every second head
    k = torch.randn(2, 5, heads, width).to(dtype)
    expected = [fused_rotary(t, *shared) for t in (q, k)]
    for result, t in zip(expected, (q, k), strict=True):
        torch.testing.assert_close(result, apply_rotary(t, *shared), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    fused_rotary_(q, k, *shared)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_activations(shape, dtype):
    gate, up = leaf(*shape, dtype=dtype, scale=3.0), leaf(*shape, dtype=dtype)
    check(fused_swiglu, swiglu, (gate, up))
    gate.grad = up.grad = None
    check(fused_geglu, geglu, (gate, up))


@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [37, 264])
def test_bias_activations(cols, kind, dtype):
    x, bias = leaf(67, cols, dtype=dtype, scale=3.0), leaf(cols)
    check(
        lambda x, b: fused_bias_activation(x, b, kind),
        lambda x, b: bias_activation(x, b, kind),
        (x, bias),
        tolerance=max(TOLERANCE[dtype], 5e-6),
    )
    check(
        lambda x: fused_bias_activation(x, None, kind),
        lambda x: bias_activation(x, None, kind),
        (leaf(3, 5, dtype=dtype),),
    )


def test_activations_far_from_zero_and_of_halves_of_one_product():
    x = torch.tensor([-100.0, -30.0, -10.0, 30.0, 100.0, 1e15, -1e15])
    for kind in Activation:
        result = fused_bias_activation(x, None, kind)
        torch.testing.assert_close(result.double(), bias_activation(x.double(), None, kind), rtol=1e-5, atol=1e-7)
    product = torch.randn(3, 4, 2 * 40).bfloat16()
    gate, up = product.chunk(2, dim=-1)
    torch.testing.assert_close(fused_swiglu(gate, up), swiglu(gate.float(), up.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("rows", "width", "classes"), [(5, 13, 11), (3, 5000, 4999), (0, 8, 8), (2, 1, 1)])
def test_cross_entropy(rows, width, classes, in_place, dtype):
    logits = leaf(rows, width, dtype=dtype, scale=3.0)
    labels = torch.randint(0, classes, (rows,))
    scale = torch.rand(rows)
    scale[:1] = 0.0  # a masked token
    losses = fused_cross_entropy(logits.clone(), labels, classes, z_loss=1e-3, in_place=in_place)
    (losses * scale).sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :classes], labels, reduction="none")
    expected = expected + 1e-3 * exact[:, :classes].logsumexp(-1).square()
    (expected * scale).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = max(TOLERANCE[dtype], 5e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=max(1e-6, tolerance * 1e-3))
    assert torch.equal(logits.grad[:, classes:], torch.zeros(rows, width - classes, dtype=dtype))


def test_cross_entropy_with_infinite_and_padded_logits():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("nan")], [3e4, -3e4, float("-inf"), float("inf")]])
    losses = fused_cross_entropy(logits, torch.tensor([2, 0]), 3)
    torch.testing.assert_close(losses, torch.tensor([0.3132617, 0.0]))
    assert fused_cross_entropy(torch.tensor([[float("nan"), 1.0]]), torch.tensor([1])).isnan()
    labels = torch.tensor([0, 5])
    if labels.is_cuda:  # the host does not wait to look at them
        assert fused_cross_entropy(logits, labels, 3)[1].isnan()
        return
    with pytest.raises(RuntimeError, match=r"label 5 must lie in \[0, 3\)"):
        fused_cross_entropy(logits, labels, 3)


def test_cross_entropy_in_place_takes_the_memory_of_the_logits_and_refuses_a_second_backward():
    logits = torch.randn(4, 9).requires_grad_()
    copy = logits * 1.0
    copy.retain_grad()
    loss = fused_cross_entropy(copy, torch.arange(4), in_place=True).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(copy.detach(), copy.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_of_the_vocabulary_add_up_to_the_whole(dtype):
    logits, labels, scale = (3 * torch.randn(6, 50)).to(dtype), torch.randint(0, 50, (6,)), torch.rand(6)
    whole = fused_cross_entropy(logits, labels)
    parts = [(0, 20), (20, 27), (47, 3)]
    for statistics in (fused_vocabulary_statistics, vocabulary_statistics):
        found = [statistics(logits[:, start : start + size], labels, start, size) for start, size in parts]
        largest = torch.stack([part[0] for part in found]).amax(0)
        total = sum(part[1] * (part[0] - largest).exp() for part in found)
        logsumexp = largest + total.log()
        torch.testing.assert_close(logsumexp - sum(part[2] for part in found), whole, rtol=2e-6, atol=2e-6)
    for start, size in parts:
        part = logits[:, start : start + size].clone()
        expected = vocabulary_gradient(part, labels, logsumexp, scale, start, size - 1, 1e-3)
        result = fused_vocabulary_gradient_(part, labels, logsumexp, scale, start, size - 1, 1e-3)
        torch.testing.assert_close(result, expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_chunked_linear_cross_entropy(fused, dtype):
    x, weight, labels = leaf(7, 16, dtype=dtype), leaf(50, 16, dtype=dtype), torch.randint(0, 45, (7,))
    scale = torch.rand(7)
    losses = linear_cross_entropy(x, weight, labels, 45, z_loss=1e-3, chunk=12, fused=fused)
    (losses * scale).sum().backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = exact_x @ exact_weight[:45].t()
    expected = F.cross_entropy(logits, labels, reduction="none") + 1e-3 * logits.logsumexp(-1).square()
    (expected * scale).sum().backward()
    tolerance = 20 * TOLERANCE[dtype] if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("least_rows", [2, 3, 256])
def test_summed_linear_cross_entropy(fused, dtype, least_rows, monkeypatch):
    monkeypatch.setattr("megalm.kernels.linear_cross_entropy._LEAST_ROWS", least_rows)
    x, weight, labels = leaf(7, 16, dtype=dtype), leaf(50, 16, dtype=dtype), torch.randint(0, 45, (7,))
    scale = torch.rand(7)
    scale[2] = 0  # a masked token
    loss = summed_linear_cross_entropy(x, weight, labels, scale, 45, z_loss=1e-3, chunk=12, fused=fused)
    (2 * loss).backward()
    single_x, single_weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    single = linear_cross_entropy(single_x, single_weight, labels, 45, z_loss=1e-3, fused=fused)
    expected = (single * scale).sum()
    (2 * expected).backward()
    tolerance = 20 * TOLERANCE[dtype] if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, single_x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad, single_weight.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (False, False)])
def test_summed_linear_cross_entropy_computes_the_gradients_that_are_wanted(needs_x, needs_weight):
    x, weight = torch.randn(5, 8, requires_grad=needs_x), torch.randn(20, 8, requires_grad=needs_weight)
    labels, scale = torch.randint(0, 20, (5,)), torch.full((5,), 0.2)
    loss = summed_linear_cross_entropy(x, weight, labels, scale, fused=True)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), labels).detach(), check_dtype=False)
    assert loss.requires_grad == (needs_x or needs_weight)
    if loss.requires_grad:
        loss.backward()
    assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
    empty = summed_linear_cross_entropy(x[:0], weight, labels[:0], scale[:0], fused=True)
    assert empty.item() == 0
    with torch.no_grad(), FlopCounterMode(display=False) as products:
        summed_linear_cross_entropy(x, weight, labels, scale, fused=True)
    assert products.get_total_flops() == 2 * x.numel() * len(weight)
    with pytest.raises(RuntimeError, match=r"token weights \(1,\) must be one for each of 5 labels"):
        summed_linear_cross_entropy(x, weight, labels, scale[:1])
    with pytest.raises(RuntimeError, match=r"labels must lie in \[0, 19\)"):
        summed_linear_cross_entropy(x, weight, torch.full((5,), 19), scale, 19)


@pytest.mark.parametrize("fused", [False, True])
def test_small_token_weights_have_their_gradients_in_float16(fused, monkeypatch):
    monkeypatch.setattr("megalm.kernels.linear_cross_entropy._LEAST_ROWS", 16)
    x, weight = leaf(64, 16, dtype=torch.float16), leaf(500, 16, dtype=torch.float16, scale=0.1)
    labels, token_weight, loss_scale = torch.randint(0, 500, (64,)), 2.0**-16, 2.0**16
    weights = torch.full((64,), token_weight)
    (loss_scale * summed_linear_cross_entropy(x, weight, labels, weights, chunk=32, fused=fused)).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    losses = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    (loss_scale * token_weight * losses).backward()
    for found, expected in zip((x, weight), exact, strict=True):
        assert (found.grad.double() - expected.grad).norm() < 2e-3 * expected.grad.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [203, 264])
def test_dropout_drops_the_share_and_the_gradient_has_the_same_mask(cols, dtype):
    x, residual = leaf(50, cols, dtype=dtype), leaf(50, cols, dtype=dtype)
    bias = torch.full((cols,), 5.0, requires_grad=True)
    torch.manual_seed(7)
    y = fused_bias_dropout_add(x, bias, residual, 0.25, True)
    torch.manual_seed(7)
    assert torch.equal(y, fused_bias_dropout_add(x, bias, residual, 0.25, True))
    assert not torch.equal(y, fused_bias_dropout_add(x, bias, residual, 0.25, True))
    y.sum().backward()
    kept = x.grad != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    expected = torch.where(kept, (x + 5.0).double() / 0.75, 0.0) + residual.double()
    torch.testing.assert_close(y.double(), expected, rtol=4 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert torch.equal(residual.grad, torch.ones_like(residual))
    torch.testing.assert_close(bias.grad, x.grad.float().sum(0))
    check(
        lambda x, r: fused_bias_dropout_add(x, None, r, 0.5, False),
        lambda x, r: bias_dropout_add(x, None, r, 0.5, False),
        (leaf(3, 7, dtype=dtype), leaf(3, 7, dtype=dtype)),
    )


@pytest.mark.parametrize("cols", [21, 24])
def test_parts_of_a_sequence_get_their_part_of_the_mask(cols):
    x, residual = torch.randn(2, 3, 12, cols)
    for residual_or_none in (residual, None):
        torch.manual_seed(7)
        whole = fused_bias_dropout_add(x, None, residual_or_none, 0.5, True)
        parts = []
        for number in range(3):
            torch.manual_seed(7)
            own = x.chunk(3, dim=1)[number].detach().requires_grad_()  # not contiguous
            beside = None if residual_or_none is None else residual_or_none.chunk(3, dim=1)[number]
            parts.append(fused_bias_dropout_add(own, None, beside, 0.5, True, (number, 3)))
            dropped = parts[-1] if beside is None else parts[-1] - beside
            (gradient,) = torch.autograd.grad(parts[-1].sum(), own)
            assert torch.equal(gradient != 0, (dropped.abs() > 1e-5) | (own.abs() < 1e-4))
        assert torch.equal(torch.cat(parts, dim=1), whole)
    torch.manual_seed(7)
    empty = fused_bias_dropout_add(x[:, :0], None, None, 0.5, True, (1, 3))
    assert empty.shape == (3, 0, cols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "cols"), [((0,), 37), ((2, 9), 37), ((1000,), 37), ((70,), 264)])
def test_embedding_gradient(tokens, cols, dtype):
    table, ids = leaf(11, cols, dtype=dtype), torch.randint(0, 9, tokens)
    check(lambda table: fused_embedding(ids, table), lambda table: embedding(ids, table), (table,))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", [None, torch.bfloat16])
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


def test_l2_norm_and_scale():
    tensors = [torch.randn(70001), torch.randn(3, 5).bfloat16(), torch.randn(0), 100 * torch.randn(9).half()]
    tensors += [torch.randn(33) for _ in range(60)]
    torch.testing.assert_close(fused_l2_norm(tensors), l2_norm(tensors), rtol=1e-6, atol=0)
    expected = [(tensor.float() * 0.5).to(tensor.dtype) for tensor in tensors]
    fused_scale_tensors(tensors, 0.5)
    for result, scaled in zip(tensors, expected, strict=True):
        assert torch.equal(result, scaled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 37), (1, 16), (33, 33), (40, 40), (3, 1040)])
@pytest.mark.parametrize("masks", ["none", "causal", "mask", "documents"])
def test_softmax(masks, queries, keys, dtype):
    options = {"causal": masks != "none"}
    if masks == "mask":
        options["visible"] = torch.rand(2, 1, queries, keys) > 0.4
        options["visible"][0, 0, 0] = False  # sees nothing
    if masks == "documents":
        documents = torch.arange(keys).expand(2, keys) // 4
        options |= {"query_documents_BT": documents[:, keys - queries :], "key_documents_BS": documents}
    scores = leaf(2, 3, queries, keys, dtype=dtype, scale=2.0)
    check(
        lambda scores: fused_masked_softmax(scores, 0.7, **options),
        lambda scores: masked_softmax(scores, 0.7, **options),
        (scores,),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", ["causal", "mask", "documents"])
def test_softmax_of_rows_for_several_warps(masks, dtype):
    size = 1096
    documents = (torch.arange(size) // 1000)[None]
    options = {
        "causal": {},
        "mask": {"visible": torch.rand(1, 1, size, size) > 0.5},
        "documents": {"query_documents_BT": documents, "key_documents_BS": documents},
    }[masks]
    check(
        lambda scores: fused_masked_softmax(scores, 0.7, causal=True, **options),
        lambda scores: masked_softmax(scores, 0.7, causal=True, **options),
        (leaf(1, 1, size, size, dtype=dtype),),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_wide_loads_cannot_read(dtype):
    """Rows of whole packs that start one element beside an aligned address."""

    def beside(*shape):
        return torch.cat([torch.zeros(1), torch.randn(shape).flatten()]).to(dtype)[1:].view(shape)

    x, other, weight, ids = beside(5, 64), beside(5, 64), torch.rand(64), torch.tensor([1, 3, 1, 0, 2])
    tables, kind = rotary_tables(torch.arange(5)[None], 16, 100.0), Activation.GELU_TANH
    for fused, reference in [
        (lambda x: fused_layer_norm(x, weight, weight, 1e-5), lambda x: layer_norm(x, weight, weight, 1e-5)),
        (lambda x: fused_swiglu(x, other), lambda x: swiglu(x, other)),
        (lambda x: fused_bias_activation(x, weight, kind), lambda x: bias_activation(x, weight, kind)),
        (lambda x: fused_cross_entropy(x, ids), lambda x: F.cross_entropy(x.float(), ids, reduction="none")),
        (lambda x: fused_masked_softmax(x[None, None], 0.5), lambda x: masked_softmax(x[None, None], 0.5)),
        (lambda x: fused_rotary(x.view(1, 5, 4, 16), *tables), lambda x: apply_rotary(x.view(1, 5, 4, 16), *tables)),
    ]:
        inputs, same = (x.detach().requires_grad_() for _ in range(2))
        y, expected = fused(inputs), reference(same)
        torch.testing.assert_close(y, expected, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
        grad = beside(*y.shape).to(y.dtype)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(inputs.grad, same.grad, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    dropped = []
    for place in (x, x.clone()):
        torch.manual_seed(3)
        dropped.append(fused_bias_dropout_add(place, weight, other, 0.5, True))
    assert torch.equal(*dropped)  # one mask
