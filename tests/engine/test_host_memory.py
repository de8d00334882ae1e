"""Freed memory stays with a training process on a CPU: its next tensor comes without new pages."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from megalm.engine.host_memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
for _ in range(3):
    torch.ones(2**25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**25)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for the GNU C library")
def test_a_tensor_like_one_before_needs_no_new_pages() -> None:
    found = {}
    for keep in (True, False):
        program = PROGRAM.format(keep=keep)
        found[keep] = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kept, faults = found[True].split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 100
    assert int(found[False].split()[1]) > 100, "the C library keeps it on its own: the setting is superfluous"
