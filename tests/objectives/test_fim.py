"""Fill in the middle: parts, rates, fragments, characters; tokens around parts by name, by setting, or added."""

import numpy as np
import pytest

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.errors import ConfigError
from megalm.objectives import build_objective
from megalm.objectives.causal import CausalObjective
from megalm.objectives.fim import Cutter, FimObjective

P, M, S, EOD, SPLIT = 1, 2, 3, 0, 4
FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 400 --objective fim "
)
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=20))


def objective(**options):
    return FimObjective(causal=CausalObjective(eod=EOD), seed=5, prefix=P, middle=M, suffix=S, **options)


def moved(chosen, tokens, number=0):
    """The tokens that the model reads, with the last label."""
    row = chosen(Sample(number, 0, np.asarray(tokens, dtype=np.int64)))
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in chosen.fields(len(tokens) - 1).items()
    }
    length = int(row["loss_mask"].sum())
    return [int(row["tokens"][0]), *row["labels"][:length].tolist()]


def restored(tokens):
    """A document as it was, and whether it was SPM; None: it was not moved."""
    if not tokens or tokens[0] != P:
        return tokens, None
    is_spm = tokens[1] == S and not (tokens[2] == M and False)
    middle_at, suffix_at = tokens.index(M), tokens.index(S)
    if is_spm and suffix_at == 1 and middle_at > 1:
        rest, suffix = tokens[middle_at + 1 :], tokens[2:middle_at]
        return rest + suffix, True
    return tokens[1:suffix_at] + tokens[middle_at + 1 :] + tokens[suffix_at + 1 : middle_at], False


def test_documents_are_permuted_and_nothing_is_lost_but_at_the_end():
    documents = [[10, 11, 12, 13], [20], [], [30, 31, 32]]
    tokens = [token for document in documents[:-1] for token in [*document, EOD]] + documents[-1]
    for number in range(200):
        found = moved(objective(rate=1.0), [*tokens, *[-1] * 12], number)
        parts, part = [], []
        for token in found:
            if token == EOD:
                parts, part = [*parts, part], []
            else:
                part.append(token)
        for document, own in zip(documents, [*parts, part], strict=True):
            if document:
                # an empty prefix of PSM reads as SPM: both tell the same document
                assert sorted(restored(own)[0]) == sorted(document)
                assert len(own) == len(document) + 3
        cut = moved(objective(rate=1.0), tokens, number)
        assert cut == found[: len(tokens)], "the length is kept"


def test_rates_are_those_that_are_asked_for():
    text = list(range(10, 30))
    rows = [moved(objective(rate=0.4, spm_rate=0.3), [*text, -1, -1, -1], number) for number in range(6_000)]
    taken = [row for row in rows if row[0] == P]
    assert len(taken) / len(rows) == pytest.approx(0.4, abs=0.02)
    # where the prefix of PSM is empty (about 2 / 22 of all) it begins as SPM does
    spm = np.mean([row[1] == S for row in taken])
    assert spm == pytest.approx(0.3 + 0.7 * 2 / 22, abs=0.04)
    cuts = [row.index(S) - 1 for row in taken if row[1] != S]
    assert np.mean(cuts) == pytest.approx(7.35, abs=0.5), "the smaller of two places out of 0 .. 20, not 0"
    again = [moved(objective(rate=0.4, spm_rate=0.3), [*text, -1, -1, -1], number) for number in range(50)[::-1]]
    assert again[::-1] == rows[:50]


def test_fragments_are_cut_by_themselves():
    tokens = [10, 11, SPLIT, 12, 13, SPLIT, 14, EOD, 20, *[-1] * 20]
    whole = moved(objective(rate=1.0, split=SPLIT, fragment_rate=0.0), tokens)
    assert whole[:8] == tokens[:8]
    found = [moved(objective(rate=0.5, split=SPLIT, fragment_rate=1.0), tokens, number) for number in range(400)]
    sizes = [row.index(EOD) for row in found]
    assert set(sizes) == {7, 16}, "no fragment, or each"
    assert np.mean([size == 16 for size in sizes]) == pytest.approx(0.5, abs=0.08)
    assert all(row[: row.index(SPLIT)].count(P) == (row.index(EOD) == 16) for row in found)


def test_characters_are_cut_without_loss():
    word = Cutter(vocabulary=Pairs())
    tokens = np.array([0, 1, 2])  # "ab" "cd" "e"
    assert word.size(tokens) == 5
    cut = [tuple(part.tolist() for part in word.cut(tokens, place)) for place in range(6)]
    assert cut == [
        ([], [0, 1, 2]), ([3], [4, 1, 2]), ([0], [1, 2]), ([0, 5], [6, 2]), ([0, 1], [2]), ([0, 1, 2], []),
    ]  # fmt: skip
    chosen = objective(rate=1.0, unit="character").with_text(Pairs())
    found = {tuple(moved(replaced(chosen), [100, 101, 102, *[-1] * 8], number)) for number in range(300)}
    assert any(103 in row for row in found)


class Pairs:
    """Tokens of one or two letters."""

    vocab_size = 7
    TEXTS = ("ab", "cd", "e", "a", "b", "c", "d")

    def encode(self, text):
        return [self.TEXTS.index(text)]

    def decode(self, ids):
        return "".join(self.TEXTS[number] for number in ids)


def replaced(chosen):
    """The objective on ids from 100 on, so that they are no others."""

    class Shifted(Pairs):
        vocab_size = 107

        def encode(self, text):
            return [100 + self.TEXTS.index(text)]

        def decode(self, ids):
            return "".join(self.TEXTS[number - 100] if number >= 100 else "" for number in ids)

    return chosen.with_text(Shifted())


def test_what_begins_so_stays_as_it_is():
    chosen = build_objective(load_config((FLAGS + "--fim-rate 1 --fim-no-prefix #!").split()), BYTES)
    for text, stays in (("#!/bin/sh", True), ("# a text!", False), ("#", False)):
        tokens = [*BYTES.encode(text), *[-1] * 8][:17]
        assert (moved(chosen, tokens)[0] == tokens[0]) == stays
    characters = build_objective(load_config((FLAGS + "--fim-rate 1 --fim-unit character").split()), BYTES)
    tokens = [*BYTES.encode("éàü"), *[-1] * 8]
    for number in range(30):
        cut = moved(characters, tokens, number)
        assert sorted(cut)[:6] == sorted(tokens)[8:14]
        assert BYTES.decode(restored(cut)[0]) in ("éàü", BYTES.decode(cut)), "no character is cut"


def test_tokens_are_found_by_name_by_setting_or_added():
    config = load_config(FLAGS.split())
    chosen = build_objective(config, BYTES)
    # pad, mask, cls and sep have the last four of 257 .. 276
    assert (chosen.prefix, chosen.suffix, chosen.middle) == (272, 271, 270)
    named = load_config((FLAGS + "--fim-prefix-token <extra_id_1> --fim-split-sample <extra_id_0>").split())
    assert (build_objective(named, BYTES).prefix, build_objective(named, BYTES).split) == (258, 257)
    with pytest.raises(ConfigError, match='fim_middle_token="<MID>" is no token of the tokenizer'):
        build_objective(load_config((FLAGS + "--fim-middle-token <MID>").split()), BYTES)
    plain = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    with pytest.raises(
        ConfigError, match=r"<fim_prefix>, <fim_middle>, <fim_suffix>; name its own .* --vocab-extra-ids"
    ):
        build_objective(config, plain)
    null = build_tokenizer(
        TokenizerConfig(tokenizer_type="NullTokenizer", tokenizer_vocab_size=300, vocab_extra_ids=20)
    )
    with pytest.raises(ConfigError, match="use --fim-unit token"):
        build_objective(load_config((FLAGS + "--fim-unit character").split()), null)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--seq-length 3", "seq_length=3 leaves objective=fim no text"),
        ("--fim-fragment-rate 0.1", "fim_fragment_rate=0.1 is for fragments"),
        ("--fim-rate 2", "fim_rate=2"),
        ("--model-family bert", "objective=fim trains decoders, not model_family=bert"),
    ],
)
def test_what_does_not_go_together_is_one_problem(flags, expected):
    with pytest.raises(ConfigError) as caught:
        load_config((FLAGS + flags).split())
    (problem,) = caught.value.problems
    assert expected in problem
