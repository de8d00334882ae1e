"""GPT-2's vocab.json and merges.txt, against transformers on the same files."""

import json
from pathlib import Path

import pytest

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import GPT2BPETokenizer, Tokenizer, build_tokenizer
from megalm.errors import DataError

TEXTS = [
    "def f(x):\n    return  x\n\n\n", "I'll we've  don't", "  two  ", "", "naïve 日本語 🙂 e\u0301", "\r\n\t",
    "nul\0 1234567",
    "\u00a0\u2003x", "<|endoftext", "a" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt."""
    import tokenizers

    path = tmp_path_factory.mktemp("gpt2")
    model = tokenizers.ByteLevelBPETokenizer()
    text = Path(__file__).read_text(encoding="utf-8")
    model.train_from_iterator([text], vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(path))
    return path


def built(folder: Path, **options: str) -> Tokenizer:
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    return build_tokenizer(TokenizerConfig(**(files | options)))


def test_ids_equal_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
    ours = built(folder)
    assert isinstance(ours, GPT2BPETokenizer)
    assert ours.encode_batch(TEXTS) == [peer(text)["input_ids"] for text in TEXTS]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert (ours.vocab_size, ours.special("eod")) == (len(peer), peer.eos_token_id)


def test_the_name_of_the_end_of_document_in_a_text_is_text(folder: Path) -> None:
    ours = built(folder)
    ids = ours.encode("a<|endoftext|>b")
    assert ours.special("eod") not in ids
    assert ours.decode(ids) == "a<|endoftext|>b"
    assert ours.decode([*ids, ours.special("eod") or 0]) == "a<|endoftext|>b"


def test_a_folder_with_both_files_needs_no_type(folder: Path) -> None:
    of_folder = build_tokenizer(TokenizerConfig(tokenizer_model=str(folder)))
    assert of_folder.identity == built(folder).identity
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(folder), tokenizer_type="HFTokenizer"))


def test_eod_can_be_chosen(folder: Path) -> None:
    assert built(folder, eod_token="!").special("eod") == json.loads((folder / "vocab.json").read_text())["!"]
    with pytest.raises(DataError, match='eod_token="<none>" is no token of'):
        built(folder, eod_token="<none>")


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, "MISSING", r"cannot read merge_file=.*merges\.txt: No such file"),
        ("{", None, "is not JSON"),
        ("[1]", None, "something else than tokens and ids"),
        ('{"a": "b"}', None, "something else than tokens and ids"),
        ('{"a": 1, "b": 1}', None, "one id to several tokens"),
        ('{"a": 0, "b": 1}', None, "lacks 254 of the 256 bytes"),
        (None, "#version: 0.2\na b c\n", "line 2: 'a b c' is not a pair"),
        (None, "#version: 0.2\nzz qq\n", "line 2: 'zz' is no token of vocab_file"),
        (None, b"\xff\xfe", "is not text"),
    ],
)
def test_damaged_files_are_named(
    folder: Path, vocab: str | None, merges: str | bytes | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "vocab.json").write_text(vocab or (folder / "vocab.json").read_text())
    if merges != "MISSING":
        content = merges or (folder / "merges.txt").read_bytes()
        (tmp_path / "merges.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        built(tmp_path)


def test_a_vocabulary_without_an_end_of_document_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    with pytest.raises(DataError, match="--eod-token"):
        built(tmp_path)
    assert built(tmp_path, eod_token="\u010a").special("eod") == vocab["\u010a"]
