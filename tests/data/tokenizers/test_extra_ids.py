"""--vocab-extra-ids: any tokenizer gets ids after its own, the last for what it lacks; texts keep theirs."""

import json

import tokenizers
from tokenizers import models, pre_tokenizers

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import build_tokenizer
from megalm.data.tokenizers.export import hugging_face_files
from megalm.data.tokenizers.extra import NEEDED


def test_any_tokenizer_gets_them_and_transformers_files_have_them(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "to": 1, "be": 2, "</s>": 3, "[MASK]": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(tokenizer_model=str(tmp_path / "tokenizer.json"))
    plain, more = (build_tokenizer(config.model_copy(update={"vocab_extra_ids": n})) for n in (None, 12))
    assert more.identity == plain.identity, "data of the one is data of the other"
    assert more.encode("to be") == plain.encode("to be") == [1, 2]
    assert more.decode([1, 2, 16]) == plain.decode([1, 2])
    assert more.vocab_size == 17
    assert (more.special("extra_id_0"), more.special("extra_id_11"), more.special("extra_id_12")) == (5, 16, None)
    missing = [name for name in NEEDED if name != "mask"]
    assert [more.special(name) for name in missing] == list(range(16, 16 - len(missing), -1))
    assert (more.special("mask"), more.special("eod")) == (4, 3)
    assert (more.token_id("<extra_id_2>"), more.token_id("be"), more.token_id("<extra_id_12>")) == (7, 2, None)
    files = hugging_face_files(more)
    again = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert [again.token_to_id(f"<extra_id_{number}>") for number in range(12)] == list(range(5, 17))
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<extra_id_11>"


def test_two_are_too_few_for_all_that_is_missing():
    few = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer", vocab_extra_ids=2))
    assert (few.special("pad"), few.special("mask"), few.special("cls")) == (258, 257, None)
    assert few.word_starts()[-3:] == [False] * 3
