"""What the fork server imports before it forks: all that a rank loads until its first step, so that it starts at once.

Imports only. Threads do not survive a fork, so nothing here may compute, open a process group or a CUDA context.
"""

import gc
import importlib

from megalm.distributed.environment import choose_accelerator

choose_accelerator(False)
for module in (
    "torch",
    "torch.utils.tensorboard",
    "deepspeed",
    "megalm.assembly",
    "megalm.cli",
    "megalm.engine.build",
    "megalm.entry",
    "megalm.parallel.pipeline.runner",
    "megalm.training",
):
    importlib.import_module(module)
# the objects of these modules stay for ever: no collection in a rank needs to look at them, or to copy their pages
gc.collect()
gc.freeze()
