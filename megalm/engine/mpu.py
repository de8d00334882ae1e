"""The mesh as DeepSpeed wants to see it: the object that `deepspeed.initialize` takes as `mpu`.

DeepSpeed asks it who shares a copy of the model ("model parallel": one gradient norm, one overflow flag) and who holds
the same weights ("data parallel": gradients are averaged and ZeRO's parts are spread there).
"""

from torch.distributed import ProcessGroup

from megalm.distributed.groups import MeshGroups


class DeepSpeedMpu:
    """DeepSpeed's questions, answered from `MeshGroups`. The method names are DeepSpeed's."""

    def __init__(self, groups: MeshGroups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.weights.group

    def get_data_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.weights.rank

    def get_data_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.weights.size

    def get_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.model_copy.group

    def get_model_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.model_copy.rank

    def get_model_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.model_copy.size

    def get_tensor_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.tensor.group

    def get_tensor_model_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.tensor.size

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:  # noqa: D102
        return self._groups.pipeline.group

    def get_pipeline_model_parallel_rank(self) -> int:  # noqa: D102
        return self._groups.pipeline.rank

    def get_pipeline_model_parallel_world_size(self) -> int:  # noqa: D102
        return self._groups.pipeline.size
