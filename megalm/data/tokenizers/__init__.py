"""Tokenizers behind one small face: text to ids and back, with what a run must know about them.

What is in a text never makes a special token, with two exceptions that keep datasets equal to their peers':
SentencePieceTokenizer takes the names of its special tokens for these tokens, as Megatron does, and HFTokenizer those
that its file lists as added tokens. No tokenizer marks the end of a document; who writes documents does that.

To add one: a class that is a `Tokenizer` (see base.py), and its entry in `TOKENIZERS`; --tokenizer-type NAME then
chooses it, and so does a file that it recognises.
"""

from megalm.data.tokenizers.base import Tokenizer
from megalm.data.tokenizers.build import TOKENIZERS, build_tokenizer, open_tokenizer
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.plain import ByteLevelTokenizer, NullTokenizer
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer, SentencePieceTokenizer
from megalm.data.tokenizers.tik_token import TikTokenizer

__all__ = [
    "TOKENIZERS",
    "ByteLevelTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "HFTokenizer",
    "Llama2Tokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "open_tokenizer",
]
