"""A run: the parts that `assembly` builds and that the training loop works on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.commands.generate import Sampler
from megalm.config import RunConfig
from megalm.continuation import Progress, Stateful
from megalm.data.run_data import RunData
from megalm.distributed.context import RankContext
from megalm.engine.engine import Engine
from megalm.monitor.logger import MetricLogger
from megalm.resilience.signals import StopRequest


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
    """Continues --sample-prompt."""
    stop: StopRequest
    identity: dict[str, Any]
    """What a checkpoint remembers of the run's inputs, to refuse others on resume."""
    origin: Path | None
    """The checkpoint that the run started from."""
    total_iters: int
    """Optimizer steps of the whole run."""
    started: float
    """When this start began, by the monotonic clock."""
    saved_step: int
    evaluated_step: int = -1

    def asked_to_stop(self) -> bool:
        """Whether a stop signal has come to any rank; every rank calls it, and has the same answer."""
        number = torch.tensor(self.stop.number, device=self.context.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return self.stop.agree(int(number))

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.config.batch.global_size(self.data.size)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank accumulates in one optimizer step."""
        return self.config.batch.accumulation(self.data.size)
