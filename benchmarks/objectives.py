"""Tokens a second that one loader worker turns into batch rows, for every objective.

    python benchmarks/objectives.py                     (half a minute)
    python benchmarks/objectives.py --trained 6200      (beside what a model trains)

CPU time, so that other processes do not count. Documents have 500 tokens on average.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.objectives import build_objective
from megalm.objectives.base import UsesDocuments

RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 1 --train-iters 1 --lr 0.1 --mock-data "
    "--tokenizer-type ByteLevelTokenizer --vocab-extra-ids 600 --vocab-size 900 "
)
BERT = "--model-family bert --objective masked "
ROBERTA = f"{BERT} --bert-no-binary-head "
T5 = "--model-family t5 --position-embedding-type relative --normalization RMSNorm --disable-bias-linear "
CASES = {
    "causal": "",
    "causal, documents apart": "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    "prefix": "--objective prefix",
    "prefix, documents apart": "--objective prefix --reset-attention-mask",
    "fim, tokens": "--objective fim --fim-rate 1",
    "fim, characters": "--objective fim --fim-rate 1 --fim-unit character",
    "masked": ROBERTA,
    "masked, whole words": f"{ROBERTA} --whole-word-masking",
    "masked, n-grams": f"{ROBERTA} --masking-max-ngram 3",
    "masked, SpanBERT": f"{ROBERTA} --masking-use-geometric-distribution --whole-word-masking",
    "masked, pairs (sop)": BERT,
    "masked, pairs (nsp)": f"{BERT} --bert-sentence-head nsp",
    "span": f"{T5} --objective span",
    "ul2": f"{T5} --objective ul2",
    "causal, fim and prefix": "--objective-mixture causal:0.5,fim:0.3,prefix:0.2",
}
LENGTHS = (512, 2048)
"""Of the model's input; UL2's longest spans do not fit into 256."""


@dataclass(frozen=True)
class OneDocument:
    """Where next texts are from; reading them from a file is not part of an objective."""

    tokens: np.ndarray

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> np.ndarray:
        """Tokens of the document."""
        return self.tokens[:length]


def rate(flags: str, seq_length: int, samples: int) -> float:
    """Tokens of the data a second."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=600))
    config = load_config(f"{RUN} {flags} --seq-length {seq_length}".split())
    objective = build_objective(config, tokenizer)
    draw, length = np.random.default_rng(0), objective.sample_tokens(seq_length)
    tokens = draw.integers(32, 127, (samples, length))
    tokens[draw.random(tokens.shape) < 1 / 500] = tokenizer.special("eod")
    if isinstance(objective, UsesDocuments) and objective.needs_documents:
        objective = objective.with_documents(OneDocument(tokens[0]))
    objective(Sample(0, 0, tokens[0]))  # tables are built at the first one
    begin = time.process_time()
    for number, row in enumerate(tokens):
        objective(Sample(number, 0, row))
    return tokens.size / (time.process_time() - begin)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="samples of each measurement")
    parser.add_argument("--trained", type=float, help="tokens a second that a model trains, to compare with")
    args = parser.parse_args()
    print(f"million tokens a second of one worker{'':13}" + "".join(f"{length:9,}" for length in LENGTHS))
    slowest = float("inf")
    for name, flags in CASES.items():
        rates = [rate(flags, length, args.samples) for length in LENGTHS]
        slowest = min(slowest, *rates)
        print(f"  {name:<48}" + "".join(f"{value / 1e6:9.1f}" for value in rates))
    if args.trained:
        print(f"the slowest is {slowest / args.trained:.0f} times the {args.trained:,.0f} tokens a second (target 50)")


if __name__ == "__main__":
    main()
