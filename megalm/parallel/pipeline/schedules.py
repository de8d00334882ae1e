"""The pipeline schedules: torch's classes that order forward and backward passes; only running pipelines load them.

Sources: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B and interleaved 1F1B (Narayanan et al. 2021,
arXiv:2104.04473), zero bubble and ZB-V (Qi et al. 2023, arXiv:2401.10241), DualPipeV (DeepSeek-AI 2024,
arXiv:2412.19437).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from megalm.config.parallel import PipelineSchedule
from megalm.config.rules.pipeline import SCHEDULES

# torch logs the whole table of actions, on every rank, when one action fails; the failure itself says what happened
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

LossFunction = Callable[[Tensor, Tensor], Tensor]


class AnyNumber1F1B(Schedule1F1B):
    """1F1B that also takes fewer micro-batches than stages: then it only never gets past its warm-up.

    torch's refuses them in the constructor, though its steps are right for any number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        PipelineScheduleSingle.__init__(self, *args, **kwargs)

    def _get_pipeline_order(self) -> None:
        """No table: 1F1B runs from its counters."""


_CLASSES: dict[PipelineSchedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": AnyNumber1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def build_schedule(
    name: PipelineSchedule, stages: Sequence[PipelineStage], micro_batches: int, loss: LossFunction
) -> Any:
    """torch's schedule over this rank's stages; gradients are left as the losses give them, summed."""
    single = SCHEDULES[name].chunks == (1, 1)
    return _CLASSES[name](stages[0] if single else list(stages), micro_batches, loss_fn=loss, scale_grads=False)
