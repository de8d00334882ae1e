"""A tokenizer as the files that transformers reads: tokenizer.json and tokenizer_config.json."""

import json
from typing import TYPE_CHECKING, Any

from megalm.data.tokenizers.base import Tokenizer
from megalm.data.tokenizers.build import WithExtraIds
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer

if TYPE_CHECKING:
    import tokenizers

_KEYS = {"bos": "bos_token", "eod": "eos_token", "pad": "pad_token", "unk": "unk_token", "mask": "mask_token"}
_CONTROL, _USER_DEFINED = 3, 4
"""Types of sentencepiece's pieces."""


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content; none for a kind of tokenizer that transformers does not have."""
    if isinstance(tokenizer, WithExtraIds):
        return _with_added(hugging_face_files(tokenizer.base), tokenizer)
    if isinstance(tokenizer, HFTokenizer | GPT2BPETokenizer):
        content = tokenizer.to_json()
    elif type(tokenizer) in (GPTSentencePieceTokenizer, Llama2Tokenizer):
        assert isinstance(tokenizer, GPTSentencePieceTokenizer)
        content = from_sentencepiece(tokenizer).to_str()
    else:
        return {}
    special = tokenizer.special_ids
    config: dict[str, Any] = {key: tokenizer.token(special[name]) for name, key in _KEYS.items() if name in special}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def _with_added(files: dict[str, bytes], tokenizer: WithExtraIds) -> dict[str, bytes]:
    """The files with the tokens after those of the base; none where transformers would give these other ids."""
    from tokenizers import AddedToken, Tokenizer

    if not files:
        return {}
    model = Tokenizer.from_str(files["tokenizer.json"].decode())
    names, first = tokenizer.extra_names, tokenizer.base.vocab_size
    model.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if [model.token_to_id(name) for name in names] != list(range(first, first + len(names))):
        return {}
    config = json.loads(files["tokenizer_config.json"])
    for name, key in _KEYS.items():
        number = tokenizer.special_ids.get(name)
        if number is not None and number >= first:
            config[key] = names[number - first]
    return {
        "tokenizer.json": model.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def from_sentencepiece(tokenizer: GPTSentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """The sentencepiece model for Hugging Face's library: the same ids, but for names of control pieces in a text.

    Those are text to sentencepiece, and the pieces themselves to transformers.
    """
    from tokenizers import AddedToken, decoders, processors

    proto = tokenizer.proto()
    model = _model(proto)
    model.normalizer = _normalizer(proto.normalizer_spec)
    tail = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    kinds = {_CONTROL: model.add_special_tokens, _USER_DEFINED: model.add_tokens}
    for piece in proto.pieces:
        if piece.type in kinds:
            kinds[piece.type]([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)])
    if isinstance(tokenizer, Llama2Tokenizer):
        begin = tokenizer.special_ids["bos"]
        token = tokenizer.token(begin)
        model.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, begin)])
    return model


def _model(proto: Any) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models

    trainer, scores = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        return Tokenizer(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    vocab = {piece: number for number, (piece, _) in enumerate(scores)}
    merges = _merges(dict(scores))
    unknown = trainer.unk_piece
    return Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback))


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best-scored piece first, as sentencepiece joins them."""
    found = []
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in scores and right in scores]
        found += [(-score, left, right) for left, right in known]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
