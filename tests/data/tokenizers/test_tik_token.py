"""tiktoken vocabularies in both layouts, against tiktoken itself and Megatron's tokenizer."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import TikTokenizer, build_tokenizer
from megalm.data.tokenizers.tik_token import _KNOWN, PATTERNS
from megalm.errors import DataError

tiktoken = pytest.importorskip("tiktoken", reason="pip install tiktoken")
TEXTS = [
    "def f(x):\n    return  x\n\n\n", "I'll WE'VE don't", "  two  ", "", "naïve 日本語 🙂 e\u0301", "\r\n\t",
    "nul\0 1234567",
    "camelCase HTTPServer", "a/b\n\n/c", "<s>no</s> <|endoftext|>",
]  # fmt: skip


def special(tokenizer: Any) -> tuple[Any, ...]:
    """End of document, begin of sequence and padding."""
    return tuple(tokenizer.special(name) for name in ("eod", "bos", "pad"))


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """A small vocabulary by rank: the 256 bytes, then merges learned from this file."""
    from tiktoken._educational import SimpleBytePairEncoding

    text = Path(__file__).read_text(encoding="utf-8")[:3000]
    ranks = SimpleBytePairEncoding.train(text, vocab_size=330, pat_str=PATTERNS["cl100k"]).mergeable_ranks
    return sorted(ranks, key=ranks.__getitem__)


def bpe_file(path: Path, tokens: list[bytes]) -> str:
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    return str(path)


def json_file(path: Path, tokens: list[bytes]) -> str:
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bpe_file_gives_tiktokens_ids(pattern: str, tokens: list[bytes], tmp_path: Path) -> None:
    path = bpe_file(tmp_path / "small.tiktoken", tokens)
    ours = build_tokenizer(TokenizerConfig(tokenizer_model=path, tiktoken_pattern=pattern))  # type: ignore[arg-type]
    peer = tiktoken.Encoding(
        "small", pat_str=PATTERNS[pattern], mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )  # fmt: skip
    assert ours.encode_batch(TEXTS) == [peer.encode_ordinary(text) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == ours.encode_batch(TEXTS)
    assert [ours.decode([*ours.encode(text), 330]) for text in TEXTS] == TEXTS
    assert (ours.vocab_size, *special(ours)) == (331, 330, None, None)


RANKS_OF = {"r50k_base": 50256, "p50k_base": 50280, "cl100k_base": 100256, "o200k_base": 199998}


@pytest.mark.parametrize("name", RANKS_OF)
def test_published_vocabularies_have_their_own_pattern_and_special_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    published = getattr(openai_public, name)()
    known = _KNOWN[RANKS_OF[name]]
    assert PATTERNS[known.pattern] == published["pat_str"]
    assert known.special == {"<|endoftext|>": published["special_tokens"]["<|endoftext|>"]}
    assert known.vocab_size == published.get("explicit_n_vocab", max(published["special_tokens"].values()) + 1)


@pytest.mark.parametrize("count", [0, 200])
def test_a_known_number_of_ranks_tells_the_rest(count: int, tokens: list[bytes], tmp_path: Path) -> None:
    fill = [b"\xff" + number.to_bytes(3) for number in range(100256 - len(tokens) + count)]
    path = bpe_file(tmp_path / "x.model", tokens + fill)
    if count:
        with pytest.raises(DataError, match=r"100456 tokens, which is no known vocabulary.*--tiktoken-pattern"):
            build_tokenizer(TokenizerConfig(tokenizer_model=path))
    else:
        found = build_tokenizer(TokenizerConfig(tokenizer_model=path))
        assert (type(found), found.vocab_size, found.special("eod")) == (TikTokenizer, 100277, 100257)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
@pytest.mark.parametrize("size", [None, 320])
def test_megatrons_json_gives_megatrons_ids(
    pattern: str, size: int | None, tokens: list[bytes], tmp_path: Path
) -> None:
    peers = pytest.importorskip("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer", exc_type=ImportError)
    path = json_file(tmp_path / "vocab.json", tokens)
    options: dict[str, Any] = {"tiktoken_pattern": pattern, "tiktoken_num_special_tokens": 10}
    ours = build_tokenizer(TokenizerConfig(tokenizer_model=path, tokenizer_vocab_size=size, **options))
    peer = peers.TikTokenTokenizer(path, num_special_tokens=10, pattern=pattern, vocab_size=size or 340)
    assert (ours.vocab_size, *special(ours)) == (peer.vocab_size, peer.eod, peer.bos_id, peer.pad_id)
    plain = [text for text in TEXTS if "<s>" not in text]
    assert ours.encode_batch(plain) == [peer.text_to_ids(text) for text in plain]
    assert ours.encode(TEXTS[-1]) == peer.tokenizer.encode_ordinary(TEXTS[-1]), "names in a text are text"
    assert [ours.decode([*ours.encode(text), 2]) for text in TEXTS] == TEXTS


def test_identity_covers_what_changes_ids(tokens: list[bytes], tmp_path: Path) -> None:
    path = json_file(tmp_path / "vocab.json", tokens)
    variants = [{}, {"pattern": "v1"}, {"num_special": 20}, {"vocab_size": 1300}]
    assert len({TikTokenizer(path, **options).identity for options in variants}) == 4  # type: ignore[arg-type]
    assert TikTokenizer(path).identity == TikTokenizer(path, pattern="v2").identity


def test_eod_can_be_chosen(tokens: list[bytes], tmp_path: Path) -> None:
    path = json_file(tmp_path / "vocab.json", tokens)
    assert TikTokenizer(path, "<SPECIAL_9>").special("eod") == 9
    with pytest.raises(DataError, match='eod_token="<none>" is no token of'):
        TikTokenizer(path, "<none>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tiktoken", b"IQ== 0\n!!! 1\n", "line 2: .* is not a token in base64"),
        ("a.tiktoken", b"IQ==\n", "line 1: .* is not a token in base64"),
        ("a.tiktoken", b"IQ== 0\nIg== 0\n", "different ranks"),
        ("a.tiktoken", b"", "different ranks"),
        ("a.tiktoken", b"IQ== 0\n", "1 tokens, which is no known vocabulary"),
        ("a.json", b"[", "is not a tiktoken vocabulary in JSON"),
        ("a.json", b'[{"rank": 0}]', "is not a tiktoken vocabulary in JSON"),
        ("a.json", b'[{"rank": 1, "token_bytes": "AA=="}]', "must hold ranks 0, 1"),
        ("a.json", b'[{"rank": 0, "token_bytes": "AA=="}]', "the 256 bytes first"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / name)))


def test_a_size_that_does_not_fit_and_missing_bytes_are_refused(tokens: list[bytes], tmp_path: Path) -> None:
    path = json_file(tmp_path / "vocab.json", tokens)
    for size in (5000, 1100):
        with pytest.raises(DataError, match=rf"--vocab-size {size} must be 1256 to 1330"):
            TikTokenizer(path, vocab_size=size)
    with pytest.raises(DataError, match="lacks 1 of the 256 single bytes"):
        TikTokenizer(bpe_file(tmp_path / "x.tiktoken", tokens[1:]), pattern="v1")


def tekken(tokens: list[bytes], **changes: Any) -> str:
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)]
    sizes = {"default_vocab_size": 10 + len(tokens) - 5, "default_num_special_tokens": 10}
    return json.dumps({"config": {"pattern": PATTERNS["o200k"]} | sizes, "vocab": vocab} | changes)


def test_mistrals_tekken_gives_its_ids(tokens: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(tekken(tokens))
    for given in (path, tmp_path):
        ours = build_tokenizer(TokenizerConfig(tokenizer_model=str(given)))
        assert isinstance(ours, TikTokenizer)
    ranks = {token: rank for rank, token in enumerate(tokens[:-5])}
    peer = tiktoken.Encoding("t", pat_str=PATTERNS["o200k"], mergeable_ranks=ranks, special_tokens={})
    assert ours.encode_batch(TEXTS) == [[10 + number for number in peer.encode_ordinary(text)] for text in TEXTS]
    assert (*special(ours), ours.vocab_size) == (2, 1, None, 10 + len(ranks))
    named = [{"rank": 4, "token_str": "</s>"}, {"rank": 7, "token_str": "<pad>"}]
    path.write_text(tekken(tokens, special_tokens=named))
    assert special(build_tokenizer(TokenizerConfig(tokenizer_model=str(path)))) == (4, None, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": 3}, {"vocab": [{}]}, {"special_tokens": [{"rank": 99, "token_str": "</s>"}]},
        {"special_tokens": [{"rank": 1, "token_str": "<x>"}]},
        {"config": {"pattern": 3, "default_vocab_size": 266, "default_num_special_tokens": 10}},
        {"config": {"pattern": "(", "default_vocab_size": 266, "default_num_special_tokens": 10}},
        {"config": {"pattern": "x", "default_vocab_size": 9999, "default_num_special_tokens": 10}},
    ],
)  # fmt: skip
def test_a_tekken_of_the_wrong_shape_is_named(tokens: list[bytes], tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "tekken.json").write_text(tekken(tokens, **changes))
    with pytest.raises(DataError, match=r"tekken\.json (is|has) no"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "tekken.json")))
