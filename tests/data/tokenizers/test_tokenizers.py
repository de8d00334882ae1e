"""Tokenizers: ids and back, special tokens, and errors that say which file and why."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import (
    ByteLevelTokenizer,
    HFTokenizer,
    Llama2Tokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
)
from megalm.data.tools.train_tokenizer import train
from megalm.errors import DataError

TEXTS = [
    "def f(x):\n    return  x\n\n\n",
    "tab\there",
    "  leading and trailing  ",
    "",
    "naïve 日本語 🙂 e\u0301",
    "\r\n",
    "nul\0",
]


def special(tokenizer: Any) -> tuple[Any, ...]:
    """End of document, begin of sequence and padding."""
    return tuple(tokenizer.special(name) for name in ("eod", "bos", "pad"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(train([Path(__file__).read_text(encoding="utf-8")], vocab_size=400))
    return path


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer.json with a stored truncation, as some files have."""
    import tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    built = tokenizers.ByteLevelBPETokenizer()
    built.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], vocab_size=400, show_progress=False)
    built.add_special_tokens(["<|endoftext|>", "<|other|>"])
    built.enable_truncation(5)
    built.save(str(path))
    return path


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteLevelTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, 256]) == text


def test_bytes_need_no_file_and_have_257_ids() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    assert (tokenizer.vocab_size, *special(tokenizer)) == (257, 256, None, None)
    assert tokenizer.decode([0xE6, 256]) == "\ufffd"


def test_sentencepiece_round_trip_and_special_ids(model: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(model)))
    assert (tokenizer.vocab_size, *special(tokenizer)) == (400, 2, 1, None)
    batch = tokenizer.encode_batch(TEXTS)
    assert batch == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS
    assert tokenizer.decode([*tokenizer.encode("x"), 2]) == "x"


def test_hugging_face_round_trip_and_special_ids(tokenizer_json: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_json)))
    stored = json.loads(tokenizer_json.read_text())
    ids = {token["content"]: token["id"] for token in stored["added_tokens"]}
    assert tokenizer.special("eod") == ids["<|endoftext|>"]
    assert tokenizer.vocab_size == max(*ids.values(), *stored["model"]["vocab"].values()) + 1
    batch = tokenizer.encode_batch(TEXTS)
    assert max(len(row) for row in batch) > 5, "a truncation stored in the file would cut documents"
    assert [tokenizer.decode(row) for row in batch] == TEXTS


def test_eod_can_be_chosen(tokenizer_json: Path, model: Path) -> None:
    chosen = HFTokenizer(str(tokenizer_json), "<|other|>")
    assert chosen.special("eod") == HFTokenizer(str(tokenizer_json)).special("eod") + 1  # type: ignore[operator]
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(model), eod_token="<s>")).special("eod") == 1
    for path in (tokenizer_json, model):
        with pytest.raises(DataError, match='eod_token="<nope>" is no token of'):
            build_tokenizer(TokenizerConfig(tokenizer_model=str(path), eod_token="<nope>"))


def test_ids_as_text() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", tokenizer_vocab_size=100))
    assert (tokenizer.vocab_size, tokenizer.special("eod")) == (101, 100)
    assert tokenizer.encode("7 99\n0") == [7, 99, 0]
    assert tokenizer.decode([7, 99, 100]) == "7 99"
    for text in ("7 x", "-1", "101", "²"):
        with pytest.raises(DataError, match="not an id"):
            tokenizer.encode(text)
    with pytest.raises(DataError, match="--tokenizer-vocab-size"):
        build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer"))


def test_identity_tells_files_and_types_apart(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(model.read_bytes())
    same, other = (build_tokenizer(TokenizerConfig(tokenizer_model=str(path))) for path in (copy, model))
    assert same.identity == other.identity
    assert same.identity == hashlib.sha256(b"GPTSentencePieceTokenizer\0" + model.read_bytes()).hexdigest()
    identities = {ByteLevelTokenizer().identity, NullTokenizer(5).identity, NullTokenizer(6).identity, same.identity}
    assert len(identities) == 4


def test_a_folder_stands_for_the_tokenizer_in_it(tokenizer_json: Path, tmp_path: Path) -> None:
    assert isinstance(build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_json.parent))), HFTokenizer)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path)))


def test_names_beside_a_tokenizer_json_count(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    names = {"eos_token": {"content": "<|other|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    found, plain = HFTokenizer(str(tmp_path / "tokenizer.json")), HFTokenizer(str(tokenizer_json))
    (end, *_) = special(plain)
    assert special(found) == (end + 1, None, end)
    assert HFTokenizer(str(tmp_path / "tokenizer.json"), "<|endoftext|>").special("eod") == plain.special("eod")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is broken"):
        HFTokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["eos", "bos", "pad"])
def test_a_named_token_that_the_vocabulary_lacks_is_an_error(tokenizer_json: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({f"{name}_token": {"content": "<lacking>"}}))
    message = rf'no token "<lacking>", which tokenizer_config\.json beside it names as its {name}_token'
    with pytest.raises(DataError, match=message):
        HFTokenizer(str(tmp_path / "tokenizer.json"))
    if name == "eos":
        HFTokenizer(str(tmp_path / "tokenizer.json"), "<|endoftext|>")
    beside.write_text(json.dumps({f"{name}_token": {"content": 5}}))
    with pytest.raises(DataError, match="is broken"):
        HFTokenizer(str(tmp_path / "tokenizer.json"))
    beside.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is broken"):
        HFTokenizer(str(tmp_path / "tokenizer.json"))


class MegatronSentencePiece:
    """Megatron's SentencePieceTokenizer by its published rules: special tokens after the pieces, found in texts."""

    def __init__(self, path: Path, extra_ids: int) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = [self.model.id_to_piece(i) for i in range(len(self.model))]
        own = [(self.model.pad_id(), "<PAD>"), (self.model.bos_id(), "<BOS>"), (self.model.eos_id(), "<EOS>")]
        names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", *(name if i < 0 else pieces[i] for i, name in own)]
        names += [f"<extra_id_{number}>" for number in range(extra_ids)]
        pieces += [name for name in names if name not in pieces]
        self.vocab_size = len(pieces)
        self.special = {name: pieces.index(name) for name in names}

    def tokenize(self, text: str) -> list[int]:
        places = {name: text.index(name) for name in self.special if name in text}
        if not places:
            return list(self.model.encode_as_ids(text))
        name = min(places, key=lambda found: places[found])
        before, after = text[: places[name]], text[places[name] + len(name) :]
        return [*self.model.encode_as_ids(before), self.special[name], *self.tokenize(after)]


@pytest.mark.parametrize("options", [{}, {"pad_id": 3}, {"bos_id": -1}, {"user_defined_symbols": ["<SEP>", "<EOD>"]}])
@pytest.mark.parametrize("extra_ids", [0, 3])
def test_sentencepiece_with_special_tokens_equals_megatrons(
    options: dict[str, Any], extra_ids: int, tmp_path: Path
) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()), model_prefix=str(tmp_path / "m"),
        vocab_size=400, byte_fallback=True, minloglevel=2, **options,
    )  # fmt: skip
    path = tmp_path / "m.model"
    peer = MegatronSentencePiece(path, extra_ids)
    config = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path), vocab_extra_ids=extra_ids
    )
    ours = build_tokenizer(config)
    texts = [*TEXTS, "a<EOD>b", "<EOD>", "</s> <s><pad><SEP>x<MASK><CLS>", "<extra_id_2><extra_id_9>", "<EOD", "<unk>"]
    assert ours.vocab_size == peer.vocab_size
    assert (ours.special("eod"), ours.special("pad")) == (
        peer.special["<EOD>"],
        peer.special["<PAD>" if "pad_id" not in options else "<pad>"],
    )
    assert ours.encode_batch(texts) == [peer.tokenize(text) for text in texts]
    assert [ours.encode(text) for text in texts] == ours.encode_batch(texts)
    assert ours.decode(ours.encode("one <EOD>two")) == "one two"


def test_the_flavours_of_one_model_are_told_apart(model: Path) -> None:
    plain = build_tokenizer(TokenizerConfig(tokenizer_model=str(model)))
    llama = Llama2Tokenizer(str(model))
    special = [SentencePieceTokenizer(str(model), extra_ids=count) for count in (0, 1)]
    assert len({t.identity for t in (plain, llama, *special)}) == 4
    assert llama.encode_batch(TEXTS) == [[1, *ids] if ids else [] for ids in plain.encode_batch(TEXTS)]
    assert [llama.encode(text) for text in TEXTS] == llama.encode_batch(TEXTS)
    assert [llama.decode(llama.encode(text)) for text in TEXTS] == TEXTS
    assert SentencePieceTokenizer(str(model), "<SEP>").special("eod") == 401
    assert SentencePieceTokenizer(str(model), "</s>").special("eod") == 2


@pytest.mark.parametrize(
    ("word", "kind"),
    [("HuggingFaceTokenizer", "HFTokenizer"), ("gptsentencepiecetokenizer", "GPTSentencePieceTokenizer"),
     ("PretrainedFromHF", "HFTokenizer"), ("bytelevelTOKENIZER", "ByteLevelTokenizer")],
)  # fmt: skip
def test_peers_names_are_accepted(word: Any, kind: str) -> None:
    assert TokenizerConfig(tokenizer_type=word).tokenizer_type == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no tokenizer is given; give --tokenizer-model FILE"),
        ({"tokenizer_type": "HFTokenizer"}, r"tokenizer_type=HFTokenizer needs a file.*tokenizer\.json"),
        ({"tokenizer_model": "vocab.txt"}, r"cannot tell the kind of tokenizer_model=vocab\.txt"),
        (
            {"tokenizer_model": "DIR/smal.model"},
            r'cannot read .*smal\.model: No such file.*did you mean ".*small\.model"',
        ),
        ({"tokenizer_model": "DIR/none/x.json"}, r"cannot read .*x\.json: No such file"),
        ({"tokenizer_model": "DIR/broken.model"}, r"broken\.model is not a sentencepiece model"),
        ({"tokenizer_model": "DIR/empty.model"}, r"empty\.model is not a sentencepiece model"),
        ({"tokenizer_model": "DIR/broken.json"}, r"broken\.json is not a Hugging Face tokenizer"),
        ({"tokenizer_model": "DIR/list.json", "tokenizer_type": "HFTokenizer"}, "needs --tokenizer-type TikTokenizer"),
        ({"tokenizer_model": "DIR/vocab.json"}, "--vocab-file and --merge-file"),
        (
            {"tokenizer_model": "DIR/llama3.model", "tokenizer_type": "SentencePieceTokenizer"},
            r"llama3\.model is not a sentencepiece model.*give --tokenizer-type TikTokenizer",
        ),
        ({"tokenizer_type": "ByteLevelTokenizer", "tokenizer_model": "x"}, "says nothing to ByteLevelTokenizer"),
        ({"tokenizer_type": "HFTokenizer", "vocab_file": "x"}, "only to GPT2BPETokenizer; leave out --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "--vocab-file vocab.json and --merge-file merges.txt"),
        ({"vocab_file": "DIR/vocab.json"}, "--vocab-file vocab.json and --merge-file merges.txt"),
        ({"tokenizer_model": "DIR/binary.json"}, r"binary\.json is not a Hugging Face tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(options: Any, message: str, tmp_path: Path) -> None:
    for name, content in [
        ("small.model", b"x"), ("broken.model", b"not a model"), ("empty.model", b""), ("broken.json", b"{}"),
        ("binary.json", b"\xff\xfe"), ("list.json", b"[]"), ("vocab.json", b'{"a": 1}'), ("llama3.model", b"IQ== 0\n"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
    options = {name: str(value).replace("DIR", str(tmp_path)) for name, value in options.items()}
    with pytest.raises(DataError, match=message):
        build_tokenizer(TokenizerConfig(**options))


SOURCES = """
import sys, types
import megalm.data.preprocess.command, megalm.data.tools.corpus, megalm.data.tools.train_tokenizer
import megalm.data.tools.inspect, megalm.data.tools.verify, megalm.data.tools.merge, megalm.data.tools.split
slow = {"torch", "deepspeed", "transformers", "sentencepiece", "tokenizers", "tiktoken"} & set(sys.modules)
assert not slow, slow
"""


def test_commands_start_without_torch() -> None:
    import subprocess

    subprocess.run([sys.executable, "-c", SOURCES], check=True, timeout=60)


def test_special_tokens_have_their_names(model: Path, tokenizer_json: Path) -> None:
    names = ("eod", "bos", "eos", "pad", "unk", "mask", "cls", "sep", "no such")
    plain, megatrons = build_tokenizer(TokenizerConfig(tokenizer_model=str(model))), SentencePieceTokenizer(str(model))
    assert [plain.special(name) for name in names] == [2, 1, 2, None, 0, None, None, None, None]
    assert [megatrons.special(name) for name in names] == [402, 1, 2, 404, 0, 403, 400, 401, None]
    assert [ByteLevelTokenizer().special(name) for name in names] == [256, *[None] * 8]
    end = HFTokenizer(str(tokenizer_json)).special("eod")
    assert [HFTokenizer(str(tokenizer_json)).special(name) for name in ("eos", "mask")] == [end, None]
    chosen = HFTokenizer(str(tokenizer_json), "<|other|>")
    assert chosen.special("eos") == end != chosen.special("eod"), "what ends documents may be another token"


UPPER = """
from megalm.data.tokenizers import TOKENIZERS, ByteLevelTokenizer

class UpperTokenizer(ByteLevelTokenizer):
    settings = ("tokenizer_model",)

    @classmethod
    def recognises(cls, path):
        return path.endswith(".upper")

    def encode(self, text):
        return super().encode(text.upper())

TOKENIZERS.add("UpperTokenizer", UpperTokenizer)
"""


@pytest.mark.parametrize("flags", ["--tokenizer-type UpperTokenizer", "--tokenizer-model any.upper"])
def test_a_module_from_outside_adds_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    import numpy as np

    from megalm.cli import main
    from megalm.data.indexed.reader import IndexedDataset
    from megalm.data.tokenizers import TOKENIZERS

    (tmp_path / "my_upper.py").write_text(UPPER)
    (tmp_path / "in.jsonl").write_text('{"text": "abc"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = f"preprocess --input in.jsonl --output-prefix out --append-eod {flags}".split()
    monkeypatch.setattr(TOKENIZERS, "_entries", dict(TOKENIZERS))
    assert main(words) != 0, "nobody knows of it yet"
    try:
        assert main([*words, "--import-module", "my_upper"]) == 0
    finally:
        sys.modules.pop("my_upper", None)
    assert np.array_equal(IndexedDataset("out_text_document")[0], [*b"ABC", 256])
