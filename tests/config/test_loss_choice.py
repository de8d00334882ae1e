"""How the loss is computed follows from the settings alone."""

import pytest

from megalm.config.merging.load import load_config
from megalm.config.rules.loss import cross_entropy_impl, logits_bytes

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 131000 --train-iters 1 --lr 0.1 --mock-data "
    "--global-batch-size 8 --micro-batch-size 4 "
)
COLUMNS = 131072  # to a multiple of 128


@pytest.mark.parametrize(
    ("flags", "size", "expected"),
    [
        ("--seq-length 1024", 4 * 1024 * COLUMNS * 4, "logits"),  # 2 GiB: not more
        ("--seq-length 1025", 4 * 1025 * COLUMNS * 4, "linear"),
        ("--seq-length 1025 --bf16", 4 * 1025 * COLUMNS * 2, "logits"),
        ("--seq-length 2049 --fp16", 4 * 2049 * COLUMNS * 2, "linear"),
        ("--seq-length 2049 --bf16 --micro-batch-size 2", 2 * 2049 * COLUMNS * 2, "logits"),
        ("--seq-length 1536 --tensor-model-parallel-size 2", 4 * 1536 * COLUMNS // 2 * 4, "logits"),
        ("--seq-length 1025 --tensor-model-parallel-size 2", 4 * 1025 * COLUMNS // 2 * 4, "logits"),
        ("--seq-length 2050 --tensor-model-parallel-size 2", 4 * 2050 * COLUMNS // 2 * 4, "linear"),
        ("--seq-length 2049 --cross-entropy-fusion-impl logits", 4 * 2049 * COLUMNS * 4, "logits"),
        ("--seq-length 2049 --cross-entropy-fusion-impl native", 4 * 2049 * COLUMNS * 4, "logits"),
        ("--seq-length 16 --cross-entropy-loss-fusion --cross-entropy-fusion-impl linear", 64 * COLUMNS * 4, "linear"),
        ("--seq-length 16 --cross-entropy-fusion-impl te", 64 * COLUMNS * 4, "logits"),
    ],
)
def test_the_loss_is_linear_where_asked_for_or_logits_are_too_large(flags: str, size: int, expected: str) -> None:
    config = load_config((MODEL + flags).split())
    assert logits_bytes(config) == size
    assert cross_entropy_impl(config) == expected
