"""Whole runs, with their folders, inside the ranks of `run_on_ranks`."""

import torch
import torch.distributed as dist

from megalm.checkpoint.run_folder import open_run_folder
from megalm.config.merging.load import load_config
from megalm.config.rules.layout import check_layout
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.errors import MegalmError
from megalm.training import pretrain


def trained(flags: str) -> str:
    """What ended the run, or nothing."""
    config = load_config(flags.split())
    check_layout(config, dist.get_world_size())
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    try:
        with open_run_folder(config.checkpoint, context, ""):
            pretrain(config, context)
    except MegalmError as error:
        return str(error)
    return ""
