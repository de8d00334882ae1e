"""DeepSpeed ZeRO-3 trains the plain model as it is: each weight is gathered when it is used, the tied one too."""

import pytest
from zero3_losses import plain_and_zero3

from megalm.kernels.building.places import find_cxx
from megalm.testing.spawner import run_on_ranks


@pytest.mark.skipif(find_cxx() is None, reason="there is no C++ compiler: DeepSpeed compiles its communication on CPUs")
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def test_zero3_losses_equal_those_of_plain_torch(tied: bool) -> None:
    (plain, zero3), *_ = run_on_ranks(1, plain_and_zero3, tied)
    assert zero3 == pytest.approx(plain, abs=1e-5)
    assert plain[0] != pytest.approx(plain[-1], abs=1e-3), "training moved nothing, so the test proves nothing"
