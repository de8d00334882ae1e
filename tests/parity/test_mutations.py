"""The rows see broken communication: each mutation breaks one collective, and a row that always runs must fail.

A mutation is a function that replaces a part of megalm in the ranks' own processes before they train.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import CI, MODELS, ROWS, RUN, Row
from test_parity import Trained, differences, expected_of, trained
from torch import nn

from megalm.distributed import functional
from megalm.distributed.groups import MeshGroups
from megalm.engine import build, engine, master_weights
from megalm.engine import pipeline_gradients as stages
from megalm.engine.mpu import DeepSpeedMpu
from megalm.engine.optimizers import muon, newton_schulz
from megalm.models.blocks.dropout import Dropout
from megalm.parallel import region, sequence, vocab
from megalm.parallel.styles import Shards
from megalm.testing.spawner import run_on_ranks

NO_COLLECTIVE = SimpleNamespace(all_reduce=lambda *_, **__: None, get_world_size=lambda *_: 1)
"""In place of torch.distributed."""


def copy_without_reduce() -> None:
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.pending.work = SimpleNamespace(wait=lambda: None)
        return gradients[0].clone(), None, None

    functional._CopyToRegion.backward = backward


def copy_to_all_ranks() -> None:
    region.copy_to_region = lambda x, _group: functional.copy_to_region(x, dist.group.WORLD)


def sum_without_reduce() -> None:
    region.all_reduce_from_region = lambda x, _group: x


def gather_without_reduce() -> None:
    region.all_gather_sequence = functional.all_gather_from_region


def gathered_again_from_own_part() -> None:
    def begin(self: Any, part: torch.Tensor) -> None:
        whole = torch.cat([part] * self.group.size(), self.dim)
        self.gathering = SimpleNamespace(wait=lambda: whole)

    functional._Again.begin = begin


def scatter_without_sum() -> None:
    region.reduce_scatter_sequence = functional.own_shard


def embedding_without_sum() -> None:
    vocab.VocabParallelEmbedding.forward = _local_rows


def _local_rows(self: vocab.VocabParallelEmbedding, tokens_BT: torch.Tensor) -> torch.Tensor:
    rows = self.weight.shape[0]
    local_BT = tokens_BT - self.tp.rank * rows
    elsewhere_BT = (local_BT < 0) | (local_BT >= rows)
    x_BTD = nn.functional.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
    return x_BTD.masked_fill(elsewhere_BT[..., None], 0.0)


def loss_without_largest_logit() -> None:
    _reduce_in_loss(lambda op: op != dist.ReduceOp.MAX)


def loss_without_sums() -> None:
    _reduce_in_loss(lambda op: op == dist.ReduceOp.MAX)


def _reduce_in_loss(wanted: Callable[[Any], bool]) -> None:
    def all_reduce(x: torch.Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        return functional.all_reduce(x, group, op) if wanted(op) else x

    vocab.all_reduce = all_reduce


def kv_without_sum() -> None:
    _gradients_without_sum("wk", "wv")


def kv_over_all_ranks() -> None:
    MeshGroups.neighbours = lambda self, axis, _count: self.by_axis[axis].group


def norms_without_sum() -> None:
    _gradients_without_sum("attention_norm", "mlp_norm", "final_norm")


def head_norms_without_sum() -> None:
    _gradients_without_sum("q_norm", "k_norm")


def biases_without_sum() -> None:
    _gradients_without_sum("wo.bias", "w_down.bias")


def positions_without_sum() -> None:
    _gradients_without_sum("positions")


def _gradients_without_sum(*parts: str) -> None:
    add = Shards.add

    def added(self: Shards, name: str, shard_spec: Any, gradient_group: Any = None) -> None:
        add(self, name, shard_spec, None if any(part in name for part in parts) else gradient_group)

    Shards.add = added


def own_dropout_mask() -> None:
    sequence.SequenceParallelDropout.__init__ = lambda self, _tp, p: Dropout.__init__(self, p)


def tied_without_sum() -> None:
    stages.dist = NO_COLLECTIVE


def tied_counted_twice() -> None:
    mark = build.mark_owned
    build.mark_owned = lambda model, shard_specs: mark(
        model, {name: replace(shard_spec, is_owner=True) for name, shard_spec in shard_specs.items()}
    )


def norm_without_reduce() -> None:
    master_weights.dist = NO_COLLECTIVE


def norm_over_tensor_ranks_only() -> None:
    DeepSpeedMpu.get_model_parallel_group = lambda self: self._groups.tensor.group
    DeepSpeedMpu.get_model_parallel_rank = lambda self: self._groups.tensor.rank
    DeepSpeedMpu.get_model_parallel_world_size = lambda self: self._groups.tensor.size


def no_data_parallel_average() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedEngine.allreduce_gradients = lambda *_, **__: None
    DeepSpeedZeroOptimizer.average_tensor = lambda *_, **__: None


def tokens_of_own_rank() -> None:
    reduce, counts = engine._all_reduce, engine.Engine._counts

    def own(self: engine.Engine, batches: Any) -> dict[str, float]:
        engine._all_reduce = lambda *_: None
        try:
            return counts(self, batches)
        finally:
            engine._all_reduce = reduce

    engine.Engine._counts = own


def loss_of_own_stage() -> None:
    engine.Engine._sum_over_ranks = lambda _self, value: value


def muon_without_the_rest() -> None:
    muon.dist = SimpleNamespace(**vars(dist) | {"batch_isend_irecv": lambda _transfers: []})


def muon_without_gather() -> None:
    muon._joined = lambda shard, dim, firsts, _group: torch.cat([shard] * len(set(firsts)), dim)


def muon_without_sums() -> None:
    newton_schulz.dist = NO_COLLECTIVE


@dataclass(frozen=True)
class Mutation:
    """What is broken, and a row that sees it; `ci` mutations are tried always, the others with --all-layouts."""

    apply: Callable[[], None]
    seen_by: Row
    ci: bool = False


MUTATIONS = [
    Mutation(copy_without_reduce, Row(2, "llama", "tp2 zero0", CI), CI),
    Mutation(copy_to_all_ranks, Row(4, "llama", "tp2 zero2 muon", CI)),
    Mutation(sum_without_reduce, Row(2, "llama", "tp2 zero0", CI)),
    Mutation(gather_without_reduce, Row(2, "llama", "tp2 sp zero0", CI)),
    Mutation(gathered_again_from_own_part, Row(2, "llama", "tp2 sp zero0", CI), CI),
    Mutation(scatter_without_sum, Row(2, "llama", "tp2 sp zero0", CI)),
    Mutation(embedding_without_sum, Row(2, "llama", "tp2 zero0", CI)),
    Mutation(loss_without_largest_logit, Row(2, "llama", "tp2 zero0", CI)),
    Mutation(loss_without_sums, Row(2, "llama", "tp2 zero0", CI)),
    Mutation(loss_without_sums, Row(2, "gpt2", "tp2 sp zero0 linear", CI)),
    Mutation(gathered_again_from_own_part, Row(2, "gpt2", "tp2 sp zero0 linear", CI)),
    Mutation(kv_without_sum, Row(4, "llama", "tp4 zero0", CI), CI),
    Mutation(kv_over_all_ranks, Row(4, "llama", "tp4 zero0", CI)),
    Mutation(norms_without_sum, Row(2, "llama", "tp2 sp zero0", CI), CI),
    Mutation(head_norms_without_sum, Row(2, "qwen", "tp2 sp zero0", CI)),
    Mutation(biases_without_sum, Row(2, "gpt2", "tp2 sp zero0", CI)),
    Mutation(positions_without_sum, Row(2, "gpt2", "tp2 sp zero0", CI)),
    Mutation(positions_without_sum, Row(2, "t5", "tp2 sp zero1", CI)),
    Mutation(own_dropout_mask, Row(2, "dropout", "tp2 sp zero0", CI)),
    Mutation(tied_without_sum, Row(2, "deep llama", "pp2 1f1b zero0", CI), CI),
    Mutation(tied_without_sum, Row(4, "deep llama", "pp2 1f1b zero2 one-by-one", CI)),
    Mutation(tied_counted_twice, Row(2, "deep llama", "pp2 gpipe zero1", CI)),
    Mutation(norm_without_reduce, Row(2, "llama", "tp2 zero0", CI)),
    Mutation(norm_without_reduce, Row(2, "deep llama", "pp2 1f1b zero0", CI)),
    Mutation(norm_over_tensor_ranks_only, Row(4, "deep llama", "tp2 pp2 1f1b zero1", CI), CI),
    Mutation(no_data_parallel_average, Row(2, "llama", "zero0", CI)),
    Mutation(no_data_parallel_average, Row(4, "deep llama", "pp2 1f1b zero2 one-by-one", CI)),
    Mutation(tokens_of_own_rank, Row(2, "llama", "zero3", CI)),
    Mutation(loss_of_own_stage, Row(2, "deep llama", "pp2 1f1b zero0", CI)),
    Mutation(muon_without_the_rest, Row(2, "uneven llama", "zero1 muon", CI)),
    Mutation(muon_without_gather, Row(2, "llama", "tp2 zero0 muon", CI), CI),
    Mutation(muon_without_sums, Row(2, "gpt2", "tp2 sp zero0 muon by-sums", CI)),
]


def mutated(apply: Callable[[], None], flags: str) -> Trained:
    """As `trained`, with a part replaced."""
    apply()
    return trained(flags)


@pytest.mark.parametrize("row", MUTATIONS, ids=lambda row: f"{row.apply.__name__}, {row.seen_by}")
def test_a_broken_collective_is_seen(row: Mutation) -> None:
    seen_by = row.seen_by
    assert seen_by in ROWS, "the row always runs"
    flags = f"{RUN} {MODELS[seen_by.model]} {seen_by.flags}"
    found = run_on_ranks(seen_by.ranks, mutated, row.apply, flags, timeout_s=60)
    assert differences(found, expected_of(seen_by), seen_by) != []
