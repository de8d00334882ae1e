"""The mesh as DeepSpeed wants to see it: the object that `deepspeed.initialize` takes as `mpu`.

DeepSpeed asks it who shares a copy of the model ("model parallel": one gradient norm, one overflow flag) and who holds
the same part of one ("data parallel": gradients are averaged and ZeRO's parts are spread there).
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Axis


class DeepSpeedMpu:
    """DeepSpeed's questions, answered from `MeshGroups`. The method names are DeepSpeed's."""

    def __init__(self, groups: MeshGroups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.group(Axis.DP)

    def get_data_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.axis_rank(Axis.DP)

    def get_data_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.size(Axis.DP)

    def get_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.model_parallel_group

    def get_model_parallel_rank(self) -> int:  # noqa: D102
        return dist.get_rank(self._groups.model_parallel_group)

    def get_model_parallel_world_size(self) -> int:  # noqa: D102
        return dist.get_world_size(self._groups.model_parallel_group)

    def get_tensor_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.group(Axis.TP)

    def get_tensor_model_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.axis_rank(Axis.TP)

    def get_tensor_model_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.size(Axis.TP)

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.group(Axis.PP)

    def get_pipeline_model_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.axis_rank(Axis.PP)

    def get_pipeline_model_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.size(Axis.PP)
