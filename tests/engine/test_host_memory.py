"""Freed memory stays with a training process on a CPU: tensors like those before come without new pages."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from megalm.engine.host_memory import FreedMemory
memory = FreedMemory({keep})
faults, sizes = [], []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(2**22), *(torch.ones(2**16) for _ in range(9)), torch.ones(2**24)]
    del step
    memory.after_step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(memory.kept, min(faults[-6:]), int(status["VmRSS"].split()[0]) // 1024)
"""


@pytest.mark.long  # it costs time and nothing else where it is lost
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for the GNU C library")
def test_tensors_like_those_before_need_no_new_pages() -> None:
    found = {}
    for keep in (True, False):
        program = PROGRAM.format(keep=keep)
        text = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        found[keep] = text.split()
    kept, faults, size_mb = found[True]
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 100
    assert int(found[False][1]) > 10000, "the C library keeps it on its own: the setting is superfluous"
    assert int(size_mb) < int(found[False][2]) + 3 * 85, "a step makes 85 MB; places that are too small are given back"
