"""How ranks share the work, and the DeepSpeed engine under it."""

from typing import Any, Literal

from pydantic import Field

from megalm.config.base import Section


class ParallelConfig(Section):
    """The axes of the rank grid and the process group."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Norms, dropout and residual work on 1/TP of the sequence on each tensor-parallel rank."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Pipeline stages that share the layers."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. Default: nccl on CUDA, gloo on CPU."""
    distributed_timeout_minutes: float = Field(10.0, gt=0)
    """A collective that takes longer than this ends the run."""


class EngineConfig(Section):
    """DeepSpeed."""

    deepspeed: bool = True
    """Accepted for DeepSpeed's habit; the engine is always DeepSpeed's."""
    deepspeed_config: str | dict[str, Any] | None = None
    """DeepSpeed JSON file, or in a recipe its content. "auto" or absent values are filled from the other settings."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """ZeRO stage. Default: the JSON's, else 1."""
    local_rank: int | None = None
    """Set by the deepspeed launcher; the environment's LOCAL_RANK is what counts."""
