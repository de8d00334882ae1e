"""The operators of a run, the same kind on every rank."""

import torch

from megalm.config.kernels import KernelsConfig
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.errors import PlatformError
from megalm.kernels import apex
from megalm.kernels.backend import FUSED, REFERENCE, Kernels
from megalm.kernels.building import library


def choose_kernels(config: KernelsConfig, device: torch.device) -> Kernels:
    """The operators for model and optimizer; every rank calls it.

    Raises:
        PlatformError: they cannot be had, or not on every rank; or Apex is asked for and cannot.
    """
    if config.use_apex:
        on_all_ranks(device, lambda: apex.check(device.type))
    loaded = on_all_ranks(device, lambda: library.load(config.kernels_backend, device.type))
    reasons = gather_json(None if loaded.fused else loaded.reason, device)
    without = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if without and len(without) < len(reasons):
        raise PlatformError(
            f"fused kernels load on some ranks and not on rank {without[0]} ({reasons[without[0]]}); make the nodes "
            "alike, or give --kernels-backend reference"
        )
    kernels = FUSED if loaded.fused else REFERENCE
    return apex.with_apex(kernels) if config.use_apex else kernels
