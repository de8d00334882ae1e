"""UL2's denoisers: the form of each, how often, and that no text loses a token."""

import numpy as np
import pytest

from megalm.config.data import TokenizerConfig
from megalm.config.merging.load import load_config
from megalm.config.spans import Denoiser, decoder_seq_length
from megalm.data.samples.sample import Sample
from megalm.data.tokenizers import build_tokenizer
from megalm.errors import ConfigError
from megalm.objectives import build_objective

RUN = (
    "--model-family t5 --objective ul2 --num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 700 "
    "--position-embedding-type relative --normalization RMSNorm --disable-bias-linear --train-iters 1 --lr 0.1 "
    "--micro-batch-size 1 --data-path x "
)
BYTES = TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=420)
NAMED = "--tokenizer-type ByteLevelTokenizer --vocab-extra-ids 420 "


GPT = RUN.replace("t5", "gpt").replace("--position-embedding-type relative", "--position-embedding-type rope")


def rows_of(flags, count, text=range(250), run=RUN):
    config = load_config((run + NAMED + flags).split())
    chosen = build_objective(config, build_tokenizer(BYTES))
    tokens = np.resize(np.asarray(text), chosen.sample_tokens(config.batch.seq_length))
    rows = [chosen(Sample(number, 0, tokens)) for number in range(count)]
    for name, field in chosen.fields(config.batch.seq_length).items():
        assert all((row[name].shape, row[name].dtype) == (field.shape, np.dtype(field.dtype)) for row in rows)
    return chosen, tokens, rows


def parts(chosen, row):
    """(mode, what the encoder reads after it, what the decoder writes), without their ends."""
    read, written = row["tokens"][row["padding_mask"]].tolist(), row["labels"][row["loss_mask"] > 0].tolist()
    assert read.pop() == written.pop() == chosen.ids.end
    return next(mode for mode, number in chosen.modes.items() if number == read[0]), read[1:], written


def test_each_text_is_there_again_and_none_loses_a_token():
    chosen, tokens, rows = rows_of("--seq-length 512 ", 150)
    assert len(tokens) == 567, "as long as the denoiser with the least noise allows"
    assert chosen.form.decoder_length == decoder_seq_length(load_config((RUN + NAMED + "--seq-length 512").split()))
    assert chosen.form.decoder_length == max(d.noise.lengths(567)[1] for d in chosen.denoisers) == 284 + 95 + 1
    kinds = set()
    for row in rows:
        mode, read, written = parts(chosen, row)
        spans, own = {}, []
        for token in written:
            if token in chosen.sentinels:
                spans[token] = own = []
            else:
                own.append(token)
        again = [token for part in read for token in spans.get(part, [part])]
        assert again == tokens.tolist()
        share = sum(map(len, spans.values())) / len(tokens)
        kinds.add((mode, round(share, 2), round(share * len(tokens) / len(spans))))
        if mode == "s":
            assert len(spans) == 1
            assert read[-1] in spans
    assert kinds == {
        ("r", 0.15, 3), ("r", 0.15, 8), ("s", 0.25, 142), ("x", 0.5, 3), ("x", 0.5, 8), ("x", 0.15, 85), ("x", 0.5, 71),
    }  # fmt: skip


def test_a_decoder_has_what_is_read_as_a_prefix_and_what_is_written_behind_it():
    """The same inputs and targets as an encoder-decoder's of the same text, in one row; the longest text fills it."""
    denoisers = "--ul2-denoisers R:0.2:2,S:0.25,X:0.5:4 "
    chosen, tokens, rows = rows_of(f"--seq-length 64 {denoisers}", 60, run=GPT)
    pair, _, _ = rows_of(f"--seq-length 64 {denoisers}", 1)
    assert max(len(row["tokens"]) for row in rows) == 64
    assert len(tokens) == 50, "spans of 2 and 4 tokens: of 51 the one with 6 sentinels would not fit"
    filled = set()
    for number, row in enumerate(rows):
        inputs, targets = chosen.sides(tokens, np.random.default_rng(number))
        assert all(map(np.array_equal, (inputs, targets), pair.sides(tokens, np.random.default_rng(number))))
        read, is_written = int(row["prefix_lengths"][0]), row["loss_mask"] > 0
        prefix, written = row["tokens"][:read].tolist(), row["labels"][is_written].tolist()
        assert prefix[0] in chosen.modes.values()
        assert prefix[-1] == written[-1] == chosen.ids.end
        assert np.flatnonzero(is_written).tolist() == list(range(read - 1, read - 1 + len(written)))
        assert row["tokens"][read : read + len(written) - 1].tolist() == written[:-1], "each is read after it"
        assert set(row["tokens"][read + len(written) - 1 :]) <= {chosen.ids.pad}
        filled.add(read + len(written) - 1)
        spans, own = {}, []
        for token in written[:-1]:
            if token in chosen.sentinels:
                spans[token] = own = []
            else:
                own.append(token)
        assert [token for part in prefix[1:-1] for token in spans.get(part, [part])] == tokens.tolist()
    assert max(filled) == 64


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--seq-length 1024 --reset-attention-mask", "reset_attention_mask=true is for rows of documents"),
        ("--seq-length 1024 --eod-mask-loss", "eod_mask_loss=true is for rows of documents"),
        ("--seq-length 5", "seq_length=5 leaves objective=ul2 no text"),
        ("--seq-length 64", "is longer than the 7 noise tokens of a text of"),
        ("--seq-length 1024 --mtp-num-layers 1", "mtp_num_layers=1 does not go with objective=ul2"),
        ("--seq-length 1024 --objective-mixture causal:1,ul2:1", "in a decoder ul2 takes texts of another length"),
        ("--seq-length 1024 --noise-density 0.3", "noise_density=0.3 is for objective=span"),
        ("--seq-length 1024 --decoder-seq-length 20", "decoder_seq_length=20 needs model_family=t5"),
    ],
)
def test_what_does_not_go_with_a_decoder_is_one_problem(flags, expected):
    with pytest.raises(ConfigError) as error:
        load_config((GPT + NAMED + flags).split())
    (problem,) = error.value.problems
    assert expected in problem


def test_denoisers_are_as_likely_as_they_are_often_named():
    config = load_config(
        [*(RUN + NAMED + "--seq-length 32").split(), "--ul2-denoisers", "R:0.15:3 S:0.25 S:0.25 X:0.5:3"]
    )
    chosen = build_objective(config, build_tokenizer(BYTES))
    tokens = np.arange(chosen.sample_tokens(32))
    modes = [parts(chosen, chosen(Sample(number, 0, tokens)))[0] for number in range(2_000)]
    assert [modes.count(mode) / 2_000 for mode in "rsx"] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    again = [parts(chosen, chosen(Sample(number, 0, tokens)))[0] for number in reversed(range(40))]
    assert again[::-1] == modes[:40]


def test_missing_tokens_are_named():
    config = load_config((RUN + NAMED + "--seq-length 512").split())
    plain = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    with pytest.raises(ConfigError, match=r"the tokens of its modes, \[R\], \[S\], \[X\]; add some: --vocab-extra-ids"):
        build_objective(config, plain)
    few = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=60))
    with pytest.raises(ConfigError, match=r"needs 95 sentinels .* and there are 57; give --vocab-extra-ids 100"):
        build_objective(config, few)


def test_a_text_of_denoisers_is_read_or_refused():
    assert [d.mode for d in Denoiser.read("R:0.15:3 x:0.5:8 S:0.25")] == ["r", "x", "s"]
    for wrong in ("Q:0.1:3", "R:0.1", "S:0", "R:0.1:0.5", "R:a:3", "S:0.5:3", "R:1:3", ""):
        with pytest.raises(ValueError, match="must"):
            Denoiser.read(wrong)
