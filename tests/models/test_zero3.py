"""The model under DeepSpeed ZeRO-3: every parameter is gathered when it is used, the tied one too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.kernels.places import find_cxx

SCRIPT = Path(__file__).with_name("zero3_losses.py")
ROOT = Path(megalm.__file__).parents[1]


@pytest.mark.timeout(300)
@pytest.mark.skipif(find_cxx() is None, reason="there is no C++ compiler: DeepSpeed compiles its communication on CPUs")
def test_zero3_losses_equal_those_of_plain_torch(tmp_path):
    pytest.importorskip("deepspeed")
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | single | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPT.parents[1]}"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "losses.json").read_text())
    for head in ("tied", "untied"):
        plain, zero3 = result[head]
        assert zero3 == pytest.approx(plain, abs=1e-5), head
        assert plain[0] != pytest.approx(plain[-1], abs=1e-3), "training moved nothing, so the test proves nothing"
