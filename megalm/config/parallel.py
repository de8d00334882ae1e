"""How ranks share the work, and the DeepSpeed engine under it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from megalm.config.base import MayDiffer, OneShot, Section
from megalm.config.paths import InputPath, PathText

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"]
PartitionMethod = Literal["flops", "parameters"]


class ParallelConfig(Section):
    """The axes of the rank grid and the process group."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Norms, dropout and residual work on 1/TP of the sequence on each tensor-parallel rank."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Pipeline ranks that share the layers."""
    pipeline_schedule: PipelineSchedule | None = None
    """Order of forward and backward passes over the pipeline. Default: 1f1b; interleaved-1f1b where a rank holds
    several stages."""
    virtual_pipeline_size: int | None = Field(None, ge=1)
    """Pipeline stages of each rank (model chunks). Default: what the schedule needs (1 or 2)."""
    num_layers_per_virtual_pipeline_stage: int | None = Field(None, ge=1)
    """The same as a number of layers: each stage has this many."""
    pipeline_layout: str | None = None
    """Layers of each pipeline stage, in the order of the model: "7,9,9,7". Default: balanced."""
    pipeline_partition: PartitionMethod = "flops"
    """What the balanced partition makes even, embedding and output head counted: compute or parameters."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. Default: nccl on CUDA, gloo on CPU."""
    distributed_timeout_minutes: float = Field(10.0, gt=0, le=525_600)
    """A collective that takes longer than this ends the run."""


class EngineConfig(Section):
    """DeepSpeed."""

    deepspeed: bool = True
    """Accepted for DeepSpeed's habit; the engine is always DeepSpeed's."""
    deepspeed_config: Annotated[PathText | dict[str, Any] | None, InputPath()] = None
    """DeepSpeed JSON file, or in a recipe its content. "auto" or absent values are filled from the other settings."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """ZeRO stage. Default: the JSON's, else 1."""
    local_rank: Annotated[int | None, MayDiffer(), OneShot()] = None
    """Set by the deepspeed launcher; the environment's LOCAL_RANK is what counts."""
