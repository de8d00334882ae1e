"""Byte-pair encoding by csrc/bpe.cpp gives what sentencepiece's does."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.kernels import bpe

sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.skipif(not bpe.is_available(), reason="no C++ compiler")


def model_of(path: Path, **options: Any) -> Any:
    texts = ["the quick brown fox jumps over the lazy dog", "abab baba aab bba", "\u3042\u3044\u3046 \u3042\u3044"] * 30
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=stream, model_type="bpe", vocab_size=360,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encoder_of(model: Any) -> bpe.PieceEncoder:
    ids = range(model.GetPieceSize())
    normal = [i for i in ids if not (model.IsControl(i) or model.IsUnknown(i) or model.IsByte(i) or model.IsUnused(i))]
    of_bytes = [model.PieceToId(f"<0x{byte:02X}>") for byte in range(256)]
    with_bytes = of_bytes if model.IsByte(of_bytes[0]) else None
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto()).normalizer_spec
    pieces = {i: (model.IdToPiece(i), model.GetScore(i)) for i in normal}
    options = {"trims": spec.remove_extra_whitespaces, "prefix": spec.add_dummy_prefix}
    return bpe.PieceEncoder(pieces, with_bytes, model.unk_id(), table=spec.precompiled_charsmap, **options)


@pytest.mark.parametrize("options", [{}, {"split_by_whitespace": False}, {"remove_extra_whitespaces": False}])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_are_sentencepiece_s(tmp_path: Path, byte_fallback: bool, options: dict[str, bool]) -> None:
    model = model_of(tmp_path / "t.model", byte_fallback=byte_fallback, **options)
    encode, draw = encoder_of(model), random.Random(1)
    parts = [*"abtheq \u3042\u3044z", "the ", "fox", "\u65e5\u672c", "\U0001f600", "\0", "\u00e9", "ab" * 50]
    parts += ["e\u0301", "\uff76\uff9e", "\u2581", "\u00b4", "\n\n", "  ", "\u3300", "\u1e9b\u0323", "\ufdfa"]
    for _ in range(3):
        texts = ["".join(draw.choices(parts, k=draw.randrange(40))) for _ in range(300)]
        ids, lengths = encode(texts)
        expected = [model.EncodeAsIds(text) for text in texts]
        assert lengths.tolist() == [len(row) for row in expected]
        assert ids.tolist() == [number for row in expected for number in row]
    assert encode([])[0].tolist() == []


def test_more_words_than_are_remembered(tmp_path: Path) -> None:
    encode = encoder_of(model_of(tmp_path / "t.model", byte_fallback=True))
    draw = random.Random(2)
    words = [" " + "".join(draw.choices("abehoqt", k=12)) for _ in range(140_000)]
    ids, lengths = encode(words)
    assert np.array_equal(encode(["".join(words)])[0], ids)
    assert np.array_equal(encode(words[:1000])[0], ids[: lengths[:1000].sum()])
