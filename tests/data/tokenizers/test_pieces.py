"""csrc/pieces.cpp gives sentencepiece's ids, for BPE and unigram models of every shape and for every text."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import texts_of

from megalm.data.tokenizers.pieces import piece_encoder
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer
from megalm.kernels import pieces

sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.skipif(not pieces.is_available(), reason="no C++ compiler")

LEARNED = [
    "the quick brown fox jumps over the lazy dog 1234 5678", "abab baba aab bba aaaa",
    "na\u00efve stra\u00dfe caf\u00e9",
    "\u3042\u3044\u3046 \u3042\u3044\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
]  # fmt: skip
AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
SYMBOLS = ["<x>", "e", "\u3044", "<a b>", " y", "ab", "abab"]
SHAPES: dict[str, dict[str, Any]] = {
    "bytes": {"byte_fallback": True},
    "unknown": {},
    "symbols": {"user_defined_symbols": SYMBOLS, "byte_fallback": True},
    "symbols, unknown": {"user_defined_symbols": SYMBOLS, "normalization_rule_name": "identity"},
    "across blanks": {"split_by_whitespace": False},
    "blanks kept": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "blanks after": {"treat_whitespace_as_suffix": True, "split_digits": True},
    "case": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True, "add_dummy_prefix": False},
    "as it is": {**AS_IT_IS, "byte_fallback": True},
}
PARTS = (
    *"abeotqx 1!.'\n\t\r\0\x01\x1c\x7f\x85\xa0\u2003\u2028\u2581\u3000\ufeff\ufffd\u00b4\u00e9\u1e9b\u212b\ufb01",
    *"\u0300\u0301\u0323\u0327\u093c\u0915\u093f\u1100\u1161\u11a8\uac00\u30ab\u3099\uff76\uff9e\uff9f\uff8a\u3300\ufdfa",
    *"\u200b\u200d\ufe0f\U0001f469\U0001f1e9\U0001d54f\u0378\U000e0041\u65e5\u672c\u0627\u0654\u3042\u3044\u3046",
    "the ", "fox", " quick", "  ", "\r\n", "ab", "aab", "ab" * 30, "a" * 50, "\u3042\u3044" * 20, "\u2581\u2581", "<x>",
    "<a b>", " y", "<a", "</s>", "<unk>", "<0x41>", "e\u0301", "\u1e9b\u0323", "\u0939\u093f\u0928\u094d\u0926\u0940",
)  # fmt: skip
"""What texts are put together from: all that some table, symbol or rule treats in a way of its own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(kind, shape) -> a model's tokenizer and the encoder of its pieces, made when asked for."""
    folder = tmp_path_factory.mktemp("models")

    class Models(dict[tuple[str, str], Any]):
        def __missing__(self, key: tuple[str, str]) -> Any:
            kind, shape = key
            path = folder / f"{len(self)}.model"
            self[key] = made = encoder_of(train(path, model_type=kind, **SHAPES[shape]))
            return made

    return Models()


def train(path: Path, **options: Any) -> Path:
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LEARNED * 12), model_writer=stream, vocab_size=400, hard_vocab_limit=False,
            num_threads=1, minloglevel=2, **options,
        )  # fmt: skip
    return path


def encoder_of(path: Path) -> tuple[GPTSentencePieceTokenizer, pieces.PieceEncoder]:
    tokenizer = GPTSentencePieceTokenizer(str(path))
    encoder = piece_encoder(tokenizer)
    assert encoder is not None
    return tokenizer, encoder


def check(model: tuple[GPTSentencePieceTokenizer, pieces.PieceEncoder], texts: list[str]) -> None:
    tokenizer, encode = model
    ids, lengths = encode(texts)
    ends = np.cumsum(lengths)
    for text, end, length, expected in zip(texts, ends, lengths, tokenizer.encode_batch(texts), strict=True):
        assert ids[end - length : end].tolist() == expected, ascii(text[:200])


KINDS = pytest.mark.parametrize("kind", ["bpe", "unigram"])
EVERY = pytest.mark.parametrize("shape", SHAPES)


@KINDS
@EVERY
def test_ids_are_sentencepiece_s(models: Any, kind: str, shape: str) -> None:
    draw = random.Random(f"{kind} {shape}")
    for _ in range(3):  # words that came before are remembered
        check(models[kind, shape], list(texts_of(PARTS, 20, draw, 300)))
    check(models[kind, shape], [])


@KINDS
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), repeated=st.integers(1, 40))
def test_ids_of_any_text(models: Any, kind: str, text: str, repeated: int) -> None:
    for shape in ("bytes", "symbols, unknown"):
        check(models[kind, shape], [text, text * repeated])


@KINDS
def test_long_texts(models: Any, kind: str) -> None:
    """Sums of scores beyond 100,000, where sentencepiece begins anew, and what has no place to cut it."""
    draw = random.Random(kind)
    words = ["ab", "aab", " the", " fox", "\u3042\u3044", "\u65e5", "1234", " quick brown", "zz", "\n", " aaaa"]
    many = 40_000 if kind == "unigram" else 4_000
    check(models[kind, "unknown"], ["".join(draw.choices(words, k=many))])
    for shape in ("bytes", "across blanks"):
        check(models[kind, shape], ["".join(draw.choices(words, k=2000)), "ab" * 2000, "a" * 4000, "\U0001f600 " * 900])


def test_more_words_than_are_remembered(models: Any) -> None:
    tokenizer, encode = models["bpe", "bytes"]
    draw = random.Random(2)
    words = [" " + "".join(draw.choices("abehoqt", k=12)) for _ in range(70_000)]
    ids, lengths = encode(words)
    assert np.array_equal(encode(words[:1000])[0], ids[: lengths[:1000].sum()])
    check((tokenizer, encode), words[:300])


SCORES: dict[str, Callable[[random.Random, int], float]] = {
    # n characters score about n times what one does, with differences that float32 cannot tell apart far into a text
    "nearly equal": lambda draw, length: -2.0 * length + draw.choice([0, 1e-3, -1e-3, 3e-4, -3e-4, 1e-5]),
    "equal": lambda draw, length: -1.0 * length,
    "positive": lambda draw, length: draw.choice([0.0, 0.25, 0.5 * length]),
    "large": lambda draw, length: -30_000.0 * length + draw.choice([0, 0.01, 3]),  # sums begin anew within a word
    "beyond float32": lambda draw, length: draw.choice([-3e38, -1e38, -1e30]),
}


@pytest.mark.parametrize("scores", SCORES)
def test_close_ways_depend_on_what_comes_before(tmp_path: Path, scores: str) -> None:
    """What was remembered at the start of a text is not taken where rounding could make another way the best."""
    path = train(tmp_path / "close.model", model_type="unigram")
    tokenizer = GPTSentencePieceTokenizer(str(path))
    proto = tokenizer.proto()
    normal = proto.SentencePiece.Type.Value("NORMAL")
    draw = random.Random(scores)
    for piece in proto.pieces:
        if piece.type == normal:
            piece.score = SCORES[scores](draw, len(piece.piece))
    path.write_bytes(proto.SerializeToString())
    words = ["aab", "abab", "the", "quick", "\u3042\u3044\u3046", "1234", "aaaa", "bba", "xbab\U0001f600ab", "abab" * 5]
    lengths = (1, 5, 50, 500, 20_000) * 6 if scores == "nearly equal" else (1, 5, 50, 500) * 6
    check(encoder_of(path), [" ".join(draw.choices(words, k=length)) for length in lengths])


def test_models_that_are_left_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(model_type: str, change: Any) -> bool:
        path = tmp_path / f"{model_type}.model"
        if not path.exists():
            train(path, model_type=model_type)
        tokenizer = GPTSentencePieceTokenizer(str(path))
        change(tokenizer.proto())
        return piece_encoder(tokenizer) is None

    types = sentencepiece.sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    assert not left("unigram", lambda proto: setattr(proto.pieces[-1], "type", types.Value("UNUSED")))
    assert left("bpe", lambda proto: setattr(proto.pieces[-1], "type", types.Value("UNUSED")))
    assert left("char", lambda proto: None)
    for table in (b"abc", b"\0\4\0\0" + b"\0" * 1024, b"\0\4\0\0" + b"\xff" * 1025, b"\0\4\0\0" + b"\0" * 1024 + b"a"):
        assert left("bpe", lambda proto, table=table: setattr(proto.normalizer_spec, "precompiled_charsmap", table))
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.1")
    assert left("unigram", lambda proto: None)
    assert not left("bpe", lambda proto: None)


@pytest.mark.long
@KINDS
@EVERY
def test_ids_of_every_character(models: Any, kind: str, shape: str) -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 4096):
        check(models[kind, shape], [f"a{chr(code)}\u0301 {chr(code)}" for code in codes[start : start + 4096]])
    draw = random.Random(f"long {kind} {shape}")
    for _ in range(20):
        check(models[kind, shape], list(texts_of(PARTS, 20, draw, 5000)))
    check(models[kind, shape], ["".join(draw.choices(PARTS, k=50_000)) for _ in range(4)])
