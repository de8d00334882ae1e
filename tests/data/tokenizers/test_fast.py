"""The fast encoder gives the library's ids for every text, with every shape of tokenizer that it takes."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_texts import texts_of

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import encode
from megalm.data.tokenizers.encode import ComparedEncoder, LibraryEncoder, WrongIdsError, choose_encoder, tokenizer_of
from megalm.data.tokenizers.encode import encoder_of as real_encoder_of
from megalm.data.tokenizers.fast import FastEncoder, same_ids
from megalm.kernels import pieces

pytest.importorskip("gigatoken")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

LEARNED = [
    "The quick brown fox jumps over the lazy dog's 1234 \n\n tails.", "caf\u00e9 na\u00efve stra\u00dfe",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \u30ac\u30d1\u30fc\u30c8",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "def f(x):\n    return x + 1\n",
]  # fmt: skip


def sentencepiece_model(path: Path, **options: Any) -> TokenizerConfig:
    defaults = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 420, "hard_vocab_limit": False}
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LEARNED * 20), model_writer=stream, minloglevel=2, **defaults | options
        )
    return TokenizerConfig(tokenizer_model=str(path))


def tokenizer_json(path: Path, normalizer: Any, added: list[Any]) -> TokenizerConfig:
    """A byte-level BPE in a tokenizer.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        model.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(LEARNED * 9, trainer)
    model.add_tokens(added)
    path.parent.mkdir(exist_ok=True)
    model.save(str(path))
    return TokenizerConfig(tokenizer_model=str(path))


def other_forms(folder: Path, path: str) -> dict[str, TokenizerConfig]:
    """The same byte-level BPE as two files, and with tiktoken's patterns."""
    content = json.loads(Path(path).read_bytes())["model"]
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    Path(files["vocab_file"]).write_text(json.dumps(content["vocab"]))
    Path(files["merge_file"]).write_text("\n".join(" ".join(pair) for pair in content["merges"]))
    names = sorted((name for name in content["vocab"] if name != "<|endoftext|>"), key=content["vocab"].__getitem__)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [token.encode() for name in names if len(name) > 1 and (token := name.replace("\u0120", " ")).isascii()]
    ranks = folder / "small.tiktoken"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    tik = {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(ranks)}
    patterns = {name: tik | {"tiktoken_pattern": name} for name in ("r50k", "cl100k", "o200k")}
    return {name: TokenizerConfig(**given) for name, given in {"vocab.json": files, **patterns}.items()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    """Every shape of tokenizer that has a fast way."""
    folder = tmp_path_factory.mktemp("shapes")
    added, normalizers = tokenizers.AddedToken, tokenizers.normalizers
    nfkc = sentencepiece_model(folder / "nfkc.model")
    as_it_is = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "normalization_rule_name": "identity"}
    words = [added("\u00e9a"), added("cafe\u0301", normalized=False), added("fox", single_word=True), added(" x ")]
    plain = tokenizer_json(folder / "plain" / "tokenizer.json", None, [])
    return {
        "nmt_nfkc": nfkc,
        "nmt_nfkc, begun": TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=nfkc.tokenizer_model),
        "nmt_nfkc, Megatron's": TokenizerConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=nfkc.tokenizer_model, vocab_extra_ids=3
        ),
        "nmt_nfkc_cf": sentencepiece_model(folder / "cf.model", normalization_rule_name="nmt_nfkc_cf"),
        "identity": sentencepiece_model(folder / "identity.model", normalization_rule_name="identity"),
        "as it is": sentencepiece_model(folder / "own.model", allow_whitespace_only_pieces=True, **as_it_is),
        "blanks kept": sentencepiece_model(folder / "blanks.model", remove_extra_whitespaces=False),
        "pieces across blanks": sentencepiece_model(folder / "across.model", split_by_whitespace=False),
        "user-defined": sentencepiece_model(
            folder / "user.model", user_defined_symbols=["<x>", "e", "\u30ab", "<a b>"]
        ),
        "unigram": sentencepiece_model(folder / "unigram.model", model_type="unigram", vocab_size=400),
        "tokenizer.json": plain,
        "NFC": tokenizer_json(folder / "nfc" / "tokenizer.json", normalizers.NFC(), words),
        "NFKC and lower case": tokenizer_json(
            folder / "lower" / "tokenizer.json",
            normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
            [added("FOX"), added("ABC", normalized=False), added("<A|b>", lstrip=True, rstrip=True)],
        ),
        "replaced": tokenizer_json(folder / "re" / "tokenizer.json", normalizers.Replace("x", "yy"), [added("axb")]),
        **other_forms(folder, str(plain.tokenizer_model)),
    }


@pytest.fixture(scope="module")
def encoder_of(shapes: dict[str, TokenizerConfig]) -> Callable[[str], FastEncoder]:
    """The fast encoder of a shape, built once."""
    built: dict[str, FastEncoder] = {}

    def of(name: str) -> FastEncoder:
        if name not in built:
            tokenizer = tokenizer_of(shapes[name])
            built[name] = FastEncoder(tokenizer, LibraryEncoder(tokenizer))
        return built[name]

    return of


NAMES = (
    "nmt_nfkc", "nmt_nfkc, begun", "nmt_nfkc, Megatron's", "nmt_nfkc_cf", "identity", "as it is", "blanks kept",
    "pieces across blanks", "user-defined", "unigram", "tokenizer.json", "NFC", "NFKC and lower case", "replaced",
    "vocab.json", "r50k", "cl100k", "o200k",
)  # fmt: skip
PARTS = (
    *"aeBx 1!.'\n\t\r\x01\x1c\x7f\x85\xa0\u2003\u2028\u2581\u3000\ufeff\ufffd\u00b4\u00e9\u1e9b\u212b\ufb01",
    *"\u0300\u0301\u0323\u0327\u093c\u0915\u093f\u1100\u1161\u11a8\uac00\u30ab\u3099\uff76\uff9e\uff9f\uff8a",
    *"\u200b\u200d\ufe0f\U0001f469\U0001f1e9\U0001d54f\u0378\U000e0041\U0001fae9\u0d62\u1734\u65e5\u672c\u0627\u0654",
    "The quick", " fox", "  ", "\r\n", "'s", "'LL", "\u017f", "12", "cafe\u0301", "caf\u00e9", "abc", "ABC", "FOX",
    "e\u0301a", "\u00e9a", " x ", "axb", "<x>", "<a b>", "<A|b>", "</s>", "<s>", "<unk>", "<0x41>", "<EOD>", "<MASK>",
    "<extra_id_1>", "<|endoftext|>", "[SEP]", "\u0939\u093f\u0928\u094d\u0926\u0940", "\ud55c\uad6d",
)  # fmt: skip
"""What texts are put together from: all that some normalization, table or token treats in a way of its own."""


def check_equal(encoder: FastEncoder, library: LibraryEncoder, texts: list[str]) -> None:
    if same_ids(encoder(texts), library(texts)):
        return
    for text in texts:
        assert encoder([text])[0].tolist() == library([text])[0].tolist(), ascii(text)
    pytest.fail("the ids of a text depend on what comes with it")


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_library_s(shapes: Any, encoder_of: Any, name: str) -> None:
    library, draw = LibraryEncoder(tokenizer_of(shapes[name])), random.Random(name)
    for _ in range(3):  # words that came before are remembered
        check_equal(encoder_of(name), library, list(texts_of(PARTS, 14, draw, 300)))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_library_s_for_every_character(shapes: Any, encoder_of: Any, name: str) -> None:
    library, encoder = LibraryEncoder(tokenizer_of(shapes[name])), encoder_of(name)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 4096):
        check_equal(encoder, library, [f"a{chr(code)}\u0301 {chr(code)}" for code in codes[start : start + 4096]])
    draw = random.Random(f"long {name}")
    for _ in range(20):
        check_equal(encoder, library, list(texts_of(PARTS, 14, draw, 5000)))


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_is_chosen(shapes: Any, name: str) -> None:
    choice = choose_encoder(shapes[name], ["The quick brown fox"])
    assert choice.fast, choice.reason
    assert isinstance(real_encoder_of(shapes[name], fast=True), ComparedEncoder)


def test_other_ids_for_a_text_that_goes_by_end_the_run(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = LibraryEncoder(tokenizer_of(shapes["nmt_nfkc"]))

    def wrong(texts: Any) -> Any:
        ids, lengths = library(texts)
        return np.where(ids == ids.max(), 0, ids) if any("dog" in text for text in texts) else ids, lengths

    monkeypatch.setattr(wrong, "names", "wrong", raising=False)
    encoder = ComparedEncoder(wrong, library, "Some")
    encoder(["fox"] * 5)
    with pytest.raises(WrongIdsError, match=r"other ids than Some's own library for a text that begins with 'a dog'"):
        encoder(["a dog"] * 5)
    monkeypatch.setattr(encode, "FastEncoder", lambda *_: wrong)
    real_encoder_of.cache_clear()
    assert choose_encoder(shapes["nmt_nfkc"], ["cat"]).fast
    choice = choose_encoder(shapes["nmt_nfkc"], ["dog"])
    real_encoder_of.cache_clear()
    assert not choice.fast
    assert "gives other ids" in choice.reason


def test_without_a_file_or_gigatoken_the_library_encodes(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose_encoder(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), []).fast
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    real_encoder_of.cache_clear()
    choice = choose_encoder(shapes["tokenizer.json"], [])
    assert not choice.fast
    assert "gigatoken is not installed" in choice.reason
    assert choose_encoder(shapes["nmt_nfkc"], []).fast == pieces.is_available()


@pytest.mark.parametrize("name", ["nmt_nfkc", "as it is", "pieces across blanks"])
def test_without_a_compiler_gigatoken_encodes(shapes: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "is_available", lambda: False)
    tokenizer = tokenizer_of(shapes[name])
    library = LibraryEncoder(tokenizer)
    encoder = FastEncoder(tokenizer, library)
    assert encoder.names == "gigatoken"
    check_equal(encoder, library, list(texts_of(PARTS, 14, random.Random(name), 300)))


def test_the_library_encoder_gives_flat_ids_and_lengths(shapes: Any) -> None:
    tokenizer = tokenizer_of(shapes["nmt_nfkc"])
    ids, lengths = LibraryEncoder(tokenizer)(["fox", "", "the fox"])
    assert lengths.tolist() == [len(tokenizer.encode("fox")), 0, len(tokenizer.encode("the fox"))]
    assert ids.tolist() == [*tokenizer.encode("fox"), *tokenizer.encode("the fox")]
