"""Models of another shape than GPT: two tensors between stages and two named losses, whole and in stages."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.models.blocks.attention import KVCache
from megalm.models.contract import Batch, Losses, Stream
from megalm.models.families import FAMILIES
from megalm.models.gpt.model import GPT
from megalm.parallel.plans import PLANS
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

STEPS, SEQ, VOCAB = 3, 8, 41
RUN = (
    f"--num-layers 4 --hidden-size 16 --num-attention-heads 2 --vocab-size {VOCAB} --make-vocab-size-divisible-by 1 "
    f"--max-position-embeddings {SEQ} --seq-length {SEQ} --micro-batch-size 1 --global-batch-size 4 --train-iters 9 "
    "--lr 0.01 --mock-data --eval-iters 0 --kernels-backend reference "
)


class TwoStreams(GPT):
    """GPT that hands the embeddings on to the end beside the residual stream, and predicts the labels' parity."""

    loss_weights: Mapping[str, float] = MappingProxyType({"lm": 1.0, "parity": 0.25})

    def embed(self, batch: Batch) -> Stream:
        (x_BTD,) = super().embed(batch)
        return x_BTD, 2.0 * x_BTD

    def run_layers(self, stream: Stream, batch: Batch, cache: KVCache | None = None) -> Stream:
        x_BTD, memory_BTD = stream
        return (*super().run_layers((x_BTD,), batch, cache), memory_BTD)

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        x_BTD, memory_BTD = stream
        odd_BT = (x_BTD + memory_BTD).float().mean(-1)
        parity_BT = torch.nn.functional.softplus(odd_BT * (1 - 2 * (batch["labels"] % 2)))
        return super().losses(stream, batch) | {"parity": parity_BT[:, ::2]}

    def counts(self, batch: Batch) -> Losses:
        return super().counts(batch) | {"parity": torch.ones_like(batch["loss_mask"][:, ::2])}

    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        return 2 * super().stream_shapes(rows, length, parts)


def trained(flags: str) -> tuple[list[list[float]], dict[str, float], Tensor]:
    """Losses and gradient norm of each step; then each loss of an evaluation, and logits."""
    FAMILIES.add("two", replace(FAMILIES["gpt"], build=TwoStreams))
    PLANS.add("two", PLANS["gpt"])
    config = load_config((RUN + flags).split())
    config = config.model_copy(update={"model": config.model.model_copy(update={"model_family": "two"})})
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, context)
    generator = torch.Generator().manual_seed(5)
    numbers, batches = [], []
    for _ in range(STEPS):
        tokens = torch.randint(0, VOCAB, (4, 1, SEQ + 1), generator=generator)
        masks = (torch.rand(4, 1, SEQ, generator=generator) > 0.4).float()
        parts = list(zip(tokens, masks, strict=True))[context.groups.data.rank :: context.groups.mesh.dp]
        batches = [batch_of(row[:, :-1], row[:, 1:], loss_mask=mask) for row, mask in parts]
        result = engine.train_step(batches, 0.01)
        assert result.loss == pytest.approx(result.losses["lm"] + 0.25 * result.losses["parity"])
        assert result.counts["parity"] == 4 * SEQ / 2
        numbers.append([result.losses["lm"], result.losses["parity"], result.grad_norm])
    evaluated = engine.mean_over_ranks(engine.eval_step(batches))
    return numbers, evaluated, engine.next_logits(torch.tensor([[3, 1, 2]]))


PP = "--pipeline-model-parallel-size 2 --pipeline-schedule "


@pytest.mark.parametrize(
    "flags",
    [
        PP + "1f1b --zero-stage 0",
        PP + "zbv --zero-stage 2",
        *(
            pytest.param(flags, marks=pytest.mark.long)
            for flags in (PP + "interleaved-1f1b --zero-stage 1", "--zero-stage 3")
        ),
    ],
)
def test_every_named_loss_and_both_streams_equal_one_process(flags: str) -> None:
    numbers, evaluated, logits = run_on_ranks(1, trained, "--zero-stage 0")[0]
    for found in run_on_ranks(2, trained, flags):
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(numbers), rtol=1e-4, atol=0)
        assert found[1] == pytest.approx(evaluated, rel=1e-4)
        torch.testing.assert_close(found[2], logits, rtol=1e-3, atol=1e-5)
