"""Every kernel test starts from the same random numbers; the emulated CUDA kernels are compiled once."""

from pathlib import Path

import pytest
import torch
from kernels import emulated


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the CUDA sources on the CPU."""
    return emulated.build(tmp_path_factory.mktemp("emulated"))
