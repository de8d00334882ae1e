"""Learning from a teacher."""

from typing import Annotated

from pydantic import Field

from megalm.config.base import Section
from megalm.config.output import HUGGING_FACE, Load
from megalm.config.paths import InputPath


class DistillationConfig(Section):
    """A teacher whose distributions the model learns beside its objective; the names are those of NVIDIA's ModelOpt."""

    teacher_load: Annotated[Load | None, InputPath(prefix=HUGGING_FACE)] = None
    """Run folder or step_N folder of a teacher, or hf:DIR, a model folder of transformers. It may have another size and
    must have the same vocabulary; a checkpoint of this run does not hold it (docs/objectives.md)."""
    logit_kl_temperature: float = Field(1.0, gt=0)
    """By what logits of both are divided before the softmax; the divergence is multiplied by its square."""
    logit_kl_topk: int | None = Field(None, ge=1)
    """The teacher's likeliest tokens on which the distributions are compared. Default: all tokens."""
    kd_loss_scale: float = Field(1.0, gt=0)
    """Weight of the divergence, which is added to the loss of the objective."""
    skip_lm_loss: bool = False
    """Train on the divergence alone; the loss of the objective is reported."""
