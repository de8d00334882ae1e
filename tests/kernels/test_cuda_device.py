"""What only a GPU can show of the CUDA kernels: devices, streams, graphs, sizes beyond 32 bits, the same bits twice."""

import pytest
import torch
from kernels.fused import ON_GPU

from megalm.kernels import registration
from megalm.kernels.activation import fused_squared_relu, fused_swiglu, swiglu
from megalm.kernels.building import library
from megalm.kernels.embedding import fused_embedding
from megalm.kernels.norm import fused_layer_norm, fused_rms_norm, rms_norm
from megalm.kernels.optimizer import adamw_step, fused_adamw_step, fused_l2_norm

pytestmark = ON_GPU
GIB = 2**30


@pytest.fixture(autouse=True)
def _loaded():
    library.load("fused", "cuda")


def test_the_library_says_the_device():
    major, minor = torch.cuda.get_device_capability()
    assert library.load("auto", "cuda").reason == f"fused, CUDA sm_{major}{minor}"
    assert registration.first_failure("cuda") is None


def test_kernels_wait_for_their_stream():
    x, weight = torch.randn(64, 512, device="cuda"), torch.ones(512, device="cuda")
    expected = rms_norm(x * 3, weight, 1e-5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = torch.full_like(x, float("nan"))
        torch.cuda._sleep(50_000_000)  # some ten milliseconds: another stream would read the NaN
        y.copy_(x * 3)
        result = fused_rms_norm(y, weight, 1e-5)
    stream.synchronize()
    torch.testing.assert_close(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_kernels_run_where_their_tensors_are():
    x, up = torch.randn(2, 9, 100, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(fused_swiglu(x, up), swiglu(x, up))
    assert torch.cuda.current_device() == 0


def test_tensors_of_two_devices_are_an_error():
    x = torch.randn(3, 8, device="cuda")
    with pytest.raises(RuntimeError, match="weight must be on the device of the input"):
        fused_rms_norm(x, torch.ones(8), 1e-5)
    with pytest.raises(RuntimeError, match="must have equal shape, dtype and device"):
        fused_swiglu(x, torch.ones(3, 8))
    with pytest.raises(RuntimeError, match="on one device"):
        fused_l2_norm([x, torch.ones(3)])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 20 * GIB, reason="needs 20 GiB of GPU memory"
)
def test_more_than_two_to_the_31_elements():
    rows, cols = 2**19 + 3, 4096
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(cols, device="cuda") % 7 - 3
    expected = torch.relu(x[-1].float()).square().bfloat16()
    y = fused_squared_relu(x)
    assert torch.equal(y[-1], expected)
    assert not y[:-1].any()
    assert fused_l2_norm([x]).item() == pytest.approx(x[-1].double().square().sum().sqrt().item())


def test_gradients_are_the_same_bits_in_every_run():
    x = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 768, device="cuda")
    table, ids = torch.randn(50, 768, device="cuda"), torch.randint(0, 50, (4096,), device="cuda")
    gradient = torch.randn_like(x)
    found = []
    for _ in range(2):
        inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias, table)]
        y = fused_layer_norm(*inputs[:3], 1e-5) + fused_embedding(ids, inputs[3]).bfloat16()
        found.append(torch.autograd.grad(y, inputs, gradient))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_a_step_of_adamw_is_captured_in_a_graph():
    options = {"factor": 1.0, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    states = [[[torch.rand(70, 33, device="cuda") for _ in range(3)] for _ in range(4)]]
    states.append([[t.clone() for t in tensors] for tensors in states[0]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_adamw_step(*states[0], [], **options)
    graph.replay()
    adamw_step(*states[1], [], **options)
    for fused, reference in zip(*states, strict=True):
        torch.testing.assert_close(fused, reference, rtol=2e-5, atol=2e-6)
