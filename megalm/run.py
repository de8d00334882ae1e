"""A run: the parts that `assembly` builds and that the training loop works on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.commands.sampler import Sampler
from megalm.config.batch_schedule import BatchSchedule
from megalm.config.lengths import Lengths
from megalm.config.sections import RunConfig
from megalm.data.run_data import RunData
from megalm.distributed.context import RankContext
from megalm.engine.engine import Engine
from megalm.monitor.logger import MetricLogger
from megalm.resilience.signals import StopRequest
from megalm.run_state import Progress, Stateful


@dataclass
class Run:
    """Everything that the training loop works on."""

    config: RunConfig
    context: RankContext
    data: RunData
    engine: Engine
    metric_logger: MetricLogger
    progress: Progress
    states: list[Stateful]
    """What a checkpoint holds besides tensors."""
    sampler: Sampler | None
    """Shows what the model makes of --sample-prompt."""
    stop: StopRequest
    identity: dict[str, Any]
    """What a checkpoint remembers of the run's inputs, to refuse others on resume."""
    origin: Path | None
    """The checkpoint that the run started from."""
    total_iters: int
    """Optimizer steps of the whole run."""
    stop_sample: int
    """The training sample at which its last step ends."""
    started: float
    """When this start began, by the monotonic clock."""
    saved_step: int
    """The last one that the run folder has; -1: none."""
    is_pruned: bool = True
    """No checkpoint waits to be removed until the last one has shown that it is good."""
    evaluated_step: int = -1
    empty_steps: int | None = None
    """Steps in a row in which no token counted; None before the first step of this start."""

    @cached_property
    def lengths(self) -> Lengths:
        """How long the run and its schedules are."""
        return Lengths.of(self.config, self.global_batch_size)

    @cached_property
    def batch_schedule(self) -> BatchSchedule:
        """Samples of each optimizer step."""
        return self.config.batch.schedule(self.data.size)

    def asked_to_stop(self) -> bool:
        """Whether a stop signal has come to any rank; every rank calls it, and has the same answer."""
        number = torch.tensor(self.stop.number, device=self.context.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return self.stop.agree(int(number))

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step, the last of the run where their number changes."""
        return self.config.batch.global_size(self.data.size)
