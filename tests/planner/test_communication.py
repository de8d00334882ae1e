"""The predicted bytes that a rank sends are those of a real run: its collectives, counted as rings."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.planner.communication import sent_bytes
from megalm.planner.layout import Layout, parameters
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --vocab-size 256 --seq-length 32 --micro-batch-size 2 "
    "--gradient-accumulation-steps 4 --train-iters 2 --lr 0.1 --mock-data --eval-iters 0 "
)
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 gathers small parameters once a step, not once a micro-batch; these are all small."""


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank's collectives send, as rings, and its sends."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = str(func).split(".")[:2]
        if namespace == "c10d":
            largest = max((leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), default=0)
            self.by_name[name] += int(_share(name, args) * largest)
        return func(*args, **(kwargs or {}))


def _share(name: str, args: tuple[object, ...]) -> float:
    """How many times its largest tensor a rank sends."""
    groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    size = dist.ProcessGroup.unbox(groups[0]).size()
    shares = {"allreduce_": 2 * (size - 1) / size, "send": 1.0, "recv_": 0.0, "barrier": 0.0}
    return shares.get(name, (size - 1) / size)  # all-gather and reduce-scatter


def measured(flags: str) -> int:
    """Bytes that this rank sends in a step, after a first one."""
    config = loaded(flags)
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, context)
    batches = [batch_of(torch.zeros(2, 32, dtype=torch.long))] * 4
    engine.train_step(batches, 0.1)
    with Sent() as sent:
        engine.train_step(batches, 0.1)
    return sent.by_name.total()


def loaded(flags: str):
    config = load_config((MODEL + flags).split())
    engine = config.engine.model_copy(update={"deepspeed_config": PARTITIONED})
    return config.model_copy(update={"engine": engine})


@dataclass(frozen=True)
class Row:
    """A layout; `ci` rows run always, the others with --all-layouts."""

    ranks: int
    flags: str
    ci: bool = False


TP, PP, FULL = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 ", "--recompute-granularity full "
ROWS = [
    Row(2, "--zero-stage 0"),
    Row(2, "--zero-stage 0 --bf16"),
    Row(2, "--zero-stage 1"),
    Row(2, "--zero-stage 1 --bf16"),
    Row(2, "--zero-stage 2 --bf16"),
    Row(2, "--zero-stage 3"),
    Row(2, "--zero-stage 0 --tensor-model-parallel-size 2 --segment-memory 32 --sampling consecutive"),
    Row(2, "--zero-stage 3 --bf16 --recompute-granularity full"),
    Row(2, TP + "--zero-stage 0"),
    Row(2, TP + "--zero-stage 0 " + FULL),
    Row(2, TP + "--zero-stage 0 --sequence-parallel"),
    Row(2, TP + "--zero-stage 0 --sequence-parallel " + FULL + "--recompute-num-layers 3", ci=True),
    Row(2, TP + "--zero-stage 0 " + FULL + "--recompute-method block --recompute-num-layers 3"),
    # one KV head on four ranks: its gradient, and those of norms of heads, are summed
    Row(4, "--tensor-model-parallel-size 4 --num-query-groups 1 --zero-stage 0"),
    Row(4, "--tensor-model-parallel-size 4 --num-query-groups 2 --qk-layernorm --zero-stage 1 --sequence-parallel"),
    Row(2, PP + "--zero-stage 0"),
    Row(2, PP + "--zero-stage 1 --pipeline-schedule zbv"),
    Row(2, PP + "--zero-stage 0 --pipeline-schedule interleaved-1f1b"),
    Row(4, PP + "--zero-stage 2"),
    Row(4, PP + "--zero-stage 3"),
    Row(4, TP + PP + "--zero-stage 0"),
    Row(4, TP + PP + "--zero-stage 1 --sequence-parallel --pipeline-schedule zbv", ci=True),
    Row(4, TP + PP + "--zero-stage 0 --sequence-parallel --pipeline-schedule interleaved-1f1b"),
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.ranks} ranks {row.flags}" for row in ROWS])
def test_predicted_bytes_are_those_that_are_sent(row: Row) -> None:
    layout = Layout.of(loaded(row.flags), row.ranks)
    most = max(parameters(layout.stages(rank)) for rank in range(layout.mesh.pp))
    predicted = sum(sent_bytes(layout, most).values())
    assert max(run_on_ranks(row.ranks, measured, row.flags)) == pytest.approx(predicted, rel=0.05)
