"""A tokenizer as the files that transformers reads."""

import json
from typing import Any

from megalm.data.tokenizers.base import Tokenizer
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer

_KEYS = {"bos": "bos_token", "eod": "eos_token", "pad": "pad_token", "unk": "unk_token", "mask": "mask_token"}


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content; none for a kind of tokenizer that transformers does not have."""
    if isinstance(tokenizer, HFTokenizer | GPT2BPETokenizer):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **_tokens(tokenizer)}
        return {"tokenizer.json": tokenizer.to_json().encode(), "tokenizer_config.json": _json(config)}
    if type(tokenizer) in (GPTSentencePieceTokenizer, Llama2Tokenizer):
        assert isinstance(tokenizer, GPTSentencePieceTokenizer)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": isinstance(tokenizer, Llama2Tokenizer),
            "add_eos_token": False,
            **_tokens(tokenizer),
        }
        return {"tokenizer.model": tokenizer.content, "tokenizer_config.json": _json(config)}
    return {}


def _tokens(tokenizer: HFTokenizer | GPT2BPETokenizer | GPTSentencePieceTokenizer) -> dict[str, str]:
    """The special tokens under the keys of a tokenizer_config.json."""
    special = tokenizer.special_ids
    return {key: tokenizer.token(special[name]) for name, key in _KEYS.items() if name in special}


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
