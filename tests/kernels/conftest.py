"""Every kernel test starts from the same random numbers, on the copy of the kernels that `on_copies` names."""

from collections.abc import Iterator

import pytest
import torch
from kernels import emulated
from kernels.fused import EMULATED, LOADED, ON_GPU, gpu

from megalm.kernels.building import library


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _copy(request: pytest.FixtureRequest) -> Iterator[None]:
    """While a test lasts, the operators run the copy of the kernels that it is parametrized by."""
    copy = getattr(request, "param", None)
    if copy is None:
        yield
    elif copy == "cuda":
        with gpu():
            yield
    elif copy == EMULATED:
        with emulated.live(LOADED.path, emulated.build()):
            yield
    else:
        widest = library.instruction_set(LOADED.path)
        if library.instruction_set(LOADED.path, copy) != copy:
            library.instruction_set(LOADED.path, widest)
            pytest.skip("this processor has no such instructions")
        yield
        library.instruction_set(LOADED.path, widest)


@pytest.fixture(params=["CPU", pytest.param("CUDA", marks=ON_GPU)])
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on the CPU, and on a GPU where there is one."""
    if request.param == "CPU":
        yield
        return
    with gpu():
        yield
