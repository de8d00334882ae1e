"""What happens to a text before it becomes tokens: cleaning, redaction, sentences; and the choice of the encoder."""

import base64
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.data import TokenizerConfig
from megalm.data.preprocess.filters import sentences
from megalm.data.preprocess.filters.clean import clean
from megalm.data.preprocess.filters.redact import redact
from megalm.data.tokenizers.encode import GigatokenEncoder, LibraryEncoder, choose_encoder, encoder_of, tokenizer_of
from megalm.data.tools.train_tokenizer import train


@pytest.mark.parametrize(
    ("text", "cleaned", "change"),
    [
        ("a\r\nb\rc", "a\nb\nc", "line ends"),
        ("a\0b\x1bc\x7f\ufeff\td\n", "abc\td\n", "control characters removed"),
        ("cafe\u0301", "caf\u00e9", "brought to NFC"),
        ("plain \u65e5\u672c", "plain \u65e5\u672c", None),
    ],
)
def test_texts_are_cleaned_and_changes_counted(text: str, cleaned: str, change: str | None) -> None:
    counts: Counter[str] = Counter()
    assert clean(text, counts) == cleaned
    assert counts == ({change: 1} if change else {})


def test_broken_encodings_are_repaired() -> None:
    pytest.importorskip("ftfy")
    counts: Counter[str] = Counter()
    assert clean("schÃ¶n", counts) == "schön"
    assert counts == {"broken encoding repaired": 1}


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text, Counter())
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t\x85" for c in once)


PII = [
    ("write to joe.doe+x@mail.example.com, now", "write to <EMAIL>, now", "e-mail addresses"),
    ("host 8.8.4.4:80 is up", "host <IP_ADDRESS>:80 is up", "IP addresses"),
    ("at 2001:db8::8a2e:370:7334.", "at <IP_ADDRESS>.", "IP addresses"),
    ("call (415) 555-2671 or so", "call <PHONE_NUMBER> or so", "phone numbers"),
    ("call +44 20 7946 0958.", "call <PHONE_NUMBER>.", "phone numbers"),
    ("key AKIAIOSFODNN7EXAMPLE!", "key <KEY>!", "keys"),
    ("ghp_" + "a1B2" * 9, "<KEY>", "keys"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nxyz\n-----END RSA PRIVATE KEY-----\nend", "<KEY>\nend", "keys"),
]


@pytest.mark.parametrize(("text", "redacted", "kind"), PII)
def test_personal_data_and_keys_are_replaced_and_counted(text: str, redacted: str, kind: str) -> None:
    pytest.importorskip("phonenumbers")
    pytest.importorskip("detect_secrets")
    counts: Counter[str] = Counter()
    assert redact(text, counts) == redacted
    assert counts == {kind: 1}


@pytest.mark.parametrize(
    "text",
    ["version 1.2.3.4.5 of 2026-01-31 10:20:30", "pi is 3.14159265358979", "f(a)@g", "127.0.0.1 and ::1", "300.1.2.3"],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    pytest.importorskip("phonenumbers")
    pytest.importorskip("detect_secrets")
    assert redact(text, Counter()) == text


def test_sentences_are_those_of_punkt() -> None:
    pytest.importorskip("nltk")
    text = "Mr. Smith came.  He left!\nDid he? Yes."
    assert sentences.split(text, "english", keep_newlines=False) == ["Mr. Smith came.", "He left!", "Did he?", "Yes."]
    assert "".join(sentences.split(text, "english", keep_newlines=True)) == text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "t.model"
    words = ["def f(x):\n    return x + 1\n", "The quick brown fox jumps.", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0"]
    path.write_bytes(train([" ".join(words[i:] * 20) for i in range(3)] * 3, vocab_size=360))
    return str(path)


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer"])
def test_gigatoken_is_used_where_its_ids_are_the_library_s(model: str, kind: Any) -> None:
    pytest.importorskip("gigatoken")
    config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=model)
    choice = choose_encoder(config, ["The quick brown fox"])
    assert choice.fast, choice.reason
    assert isinstance(encoder_of(config, fast=True), GigatokenEncoder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    """One byte-level BPE in every form in which it can be given."""
    tokenizers = pytest.importorskip("tokenizers")
    folder, alphabet = tmp_path_factory.mktemp("bpe"), tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["The quick brown fox jumps over the lazy dog's 1234 \n\n tails."] * 9, trainer)
    model.save(str(folder / "tokenizer.json"))
    content = json.loads(model.to_str())["model"]
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    Path(files["vocab_file"]).write_text(json.dumps(content["vocab"]))
    Path(files["merge_file"]).write_text("\n".join(" ".join(pair) for pair in content["merges"]))
    names = sorted((name for name in content["vocab"] if name != "<|endoftext|>"), key=content["vocab"].__getitem__)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [token.encode() for name in names if len(name) > 1 and (token := name.replace("\u0120", " ")).isascii()]
    ranks = folder / "small.tiktoken"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    tik = {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(ranks)}
    given = {
        "tokenizer.json": {"tokenizer_model": str(folder / "tokenizer.json")},
        "folder": {"tokenizer_model": str(folder)},
    }
    given |= {
        "vocab.json": files,
        **{pattern: tik | {"tiktoken_pattern": pattern} for pattern in ("r50k", "cl100k", "o200k")},
    }
    return {name: TokenizerConfig(**settings) for name, settings in given.items()}


@pytest.mark.parametrize("form", ["tokenizer.json", "folder", "vocab.json", "r50k", "cl100k", "o200k"])
def test_gigatoken_encodes_byte_level_bpe_in_every_form(byte_level: dict[str, TokenizerConfig], form: str) -> None:
    pytest.importorskip("gigatoken")
    config = byte_level[form]
    choice = choose_encoder(config, ["The quick brown fox"])
    assert choice.fast, choice.reason
    draw = random.Random(1)
    parts = [
        "The quick",
        " fox",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "\u017f",
        "\u00a0",
        "\u0301",
        "12",
        "!",
        "\u65e5",
        "<|endoftext|>",
    ]
    texts = ["".join(draw.choices(parts, k=draw.randrange(20))) for _ in range(500)]
    fast, own = (encoder_of(config, fast=fast)(texts) for fast in (True, False))
    assert np.array_equal(fast[0], own[0])
    assert np.array_equal(fast[1], own[1])


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    """sentencepiece's own defaults, which normalize and trim; by name of the normalization."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("gigatoken")
    folder = tmp_path_factory.mktemp("spm")
    texts = ["The quick brown fox jumps over the lazy dog", "caf\u00e9 na\u00efve stra\u00dfe", "12345 67890"] * 20
    for name in ("nmt_nfkc", "identity"):
        with open(folder / f"{name}.model", "wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=stream, vocab_size=330, hard_vocab_limit=False,
                model_type="bpe", byte_fallback=True, normalization_rule_name=name, minloglevel=2,
            )  # fmt: skip
    return {path.stem: TokenizerConfig(tokenizer_model=str(path)) for path in folder.iterdir()}


odd = st.text(
    st.sampled_from(
        "aB \n\t\r\x01\x7f\x85\xa0\u1e9b\u0323\u0301\u1100\u1161\u11a8\u2003\u2581\u3000\ufb01\u200d\U0001f469"
    )
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(odd | st.text()), st.sampled_from(["nmt_nfkc", "identity"]))
def test_gigatoken_leaves_to_the_library_what_a_normalizing_model_may_change(
    normalizing: dict[str, TokenizerConfig], texts: list[str], name: str
) -> None:
    config = normalizing[name]
    choice = choose_encoder(config, ["The quick brown fox"])
    assert choice.fast, choice.reason
    fast = encoder_of(config, fast=True)
    assert not fast._is_risky("The quick brown fox\njumps, caf\u00e9 \U0001f600")
    got, expected = fast(texts), encoder_of(config, fast=False)(texts)
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1], expected[1])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["</s>", "a<EOD>b", "<s> x", "<unk>", "The  quick\n", "<MASK>"]))))
def test_gigatoken_gives_the_library_s_ids(texts: list[str]) -> None:
    pytest.importorskip("gigatoken")
    for kind in ("GPTSentencePieceTokenizer", "SentencePieceTokenizer"):
        config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=_MODEL[0])
        got, expected = (encoder(texts) for encoder in (encoder_of(config, fast=True), encoder_of(config, fast=False)))
        assert np.array_equal(got[0], expected[0])
        assert np.array_equal(got[1], expected[1])


_MODEL: list[str] = []


@pytest.fixture(autouse=True)
def _known_model(model: str) -> None:
    _MODEL[:] = [model]


def test_gigatoken_is_not_used_where_an_id_differs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    config = TokenizerConfig(tokenizer_model=model)
    real = GigatokenEncoder._encode

    def wrong(self: GigatokenEncoder, texts: Any) -> Any:
        ids, lengths = real(self, texts)
        return np.where(ids == ids.max(), 0, ids) if "fox" in texts else ids, lengths

    monkeypatch.setattr(GigatokenEncoder, "_encode", wrong)
    assert choose_encoder(config, ["cat"]).fast
    choice = choose_encoder(config, ["fox"])
    assert not choice.fast
    assert "gives other ids" in choice.reason


def test_without_a_file_or_gigatoken_the_library_encodes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose_encoder(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), []).fast
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    choice = choose_encoder(TokenizerConfig(tokenizer_model=model), [])
    assert not choice.fast
    assert "gigatoken is not installed" in choice.reason


def test_the_library_encoder_gives_flat_ids_and_lengths(model: str) -> None:
    tokenizer = tokenizer_of(TokenizerConfig(tokenizer_model=model))
    ids, lengths = LibraryEncoder(tokenizer)(["fox", "", "the fox"])
    assert lengths.tolist() == [len(tokenizer.encode("fox")), 0, len(tokenizer.encode("the fox"))]
    assert ids.tolist() == [*tokenizer.encode("fox"), *tokenizer.encode("the fox")]
