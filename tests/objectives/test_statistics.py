"""What objectives report of their batches (data/ in TensorBoard) is what is in them, and what was asked for."""

import numpy as np
import pytest

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.batch import Batch
from megalm.data.run_data import RunData
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.samples.sample import PAD, Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.monitor.names import is_over_samples, tag_of
from megalm.objectives import build_objective

RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 2 --train-iters 1 --lr 0.1 "
    "--vocab-size 700 --mock-data --tokenizer-type ByteLevelTokenizer --vocab-extra-ids 100 "
)
T5 = "--model-family t5 --position-embedding-type relative --normalization RMSNorm --disable-bias-linear "
BERT = "--model-family bert --objective masked "
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=100))


def reported(flags, rows=300, padding=0):
    config = load_config((RUN + flags).split())
    objective = build_objective(config, BYTES)
    length = objective.sample_tokens(config.batch.seq_length)
    data = MockDataset(250, length - 1, 1, rows)
    if getattr(objective, "needs_documents", False):
        objective = objective.with_documents(data)
    examples = []
    for number in range(rows):
        tokens = data[number].tokens.copy()
        tokens[length - padding :] = PAD
        examples.append(objective(Sample(number, 0, tokens)))
    import torch

    parts = [
        Batch(tensors={name: torch.from_numpy(np.stack([row[name] for row in part])) for name in part[0]})
        for part in (examples[: rows // 3], examples[rows // 3 :])
    ]
    run_data = RunData(
        config=config, rank=0, size=1, pin_memory=False, objective=objective, train=None, valid={}, test=None
    )
    return {name.removeprefix("data/"): value for name, value in run_data.statistics(parts).items()}


@pytest.mark.parametrize(
    ("flags", "padding", "expected"),
    [
        ("--seq-length 32", 0, {}),
        (
            f"{BERT} --seq-length 64 --masking-use-geometric-distribution --bert-no-binary-head", 16,
            {"mask_rate": 0.15, "mean_span": 3.8, "padding_share": 0.25},
        ),
        (
            f"{BERT} --seq-length 64 --reset-attention-mask --bert-no-binary-head", 0,
            {"mask_rate": 0.15, "mean_span": 1.17, "padding_share": 0.0},
        ),
        (
            f"{BERT} --seq-length 64 --bert-sentence-head nsp --short-seq-prob 0", 0,
            {"mask_rate": 0.15, "mean_span": 1.17, "padding_share": 0.0, "random_share": 0.5},
        ),
        (f"{T5} --objective span --seq-length 128", 0, {"mask_rate": 0.15, "mean_span": 3.0, "padding_share": 0.0}),
        (
            f"{T5} --objective ul2 --seq-length 128 --ul2-denoisers R:0.1:2,S:0.3,X:0.5:8", 0,
            {
                "mask_rate": 0.3, "mean_span": 7.4, "padding_share": 0.28, "share_r": 1 / 3, "share_s": 1 / 3,
                "share_x": 1 / 3,
            },
        ),
        (
            "--objective ul2 --seq-length 128 --ul2-denoisers R:0.1:2,S:0.3,X:0.5:8", 0,
            {
                "mask_rate": 0.3, "mean_span": 7.2, "padding_share": 0.036, "share_r": 1 / 3, "share_s": 1 / 3,
                "share_x": 1 / 3,
            },
        ),
        ("--seq-length 40 --objective prefix", 0, {"prefix_share": 0.5}),
        ("--seq-length 40 --objective fim --fim-rate 0.3", 0, {"fim_rate": 0.3}),
        (
            "--seq-length 40 --objective-mixture causal:0.5,fim:0.3,prefix:0.2", 0,
            {"share_causal": 0.5, "share_fim": 0.3, "share_prefix": 0.2, "fim_rate": 0.5, "prefix_share": 0.5},
        ),
    ],
)  # fmt: skip
def test_what_is_reported_is_what_was_asked_for(flags, padding, expected):
    found = reported(flags, rows=1_500 if "fim" in flags else 300, padding=padding)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.12, abs=0.02), name


def test_its_tags_are_under_data_and_over_steps_only():
    assert tag_of("data/mask_rate") == "data/mask-rate"
    assert not is_over_samples("data/mask_rate")
    assert tag_of("fim_loss") == "fim loss"
    assert is_over_samples("fim_loss")
