"""megalm's own encoder of a sentencepiece model, where it gives sentencepiece's ids for every text."""

import logging
from typing import Any

from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer
from megalm.kernels import pieces

log = logging.getLogger("megalm")

_UNIGRAM_SINCE = (0, 2, 2)
"""The sentencepiece that adds scores as csrc/pieces_unigram.h does: 0.2.1 has other ones for user-defined symbols."""


def piece_encoder(tokenizer: GPTSentencePieceTokenizer) -> pieces.PieceEncoder | None:
    """The encoder of the model's own pieces; None where it does not suit, or there is no compiler."""
    proto = tokenizer.proto()
    kinds = {
        kind: proto.SentencePiece.Type.Value(kind) for kind in ("NORMAL", "USER_DEFINED", "UNUSED", "UNKNOWN", "BYTE")
    }
    by_kind = {
        kind: {number: piece for number, piece in enumerate(proto.pieces) if piece.type == value}
        for kind, value in kinds.items()
    }
    if not _suits(proto, by_kind) or not pieces.is_available():
        return None
    symbols, of_bytes = by_kind["USER_DEFINED"], {piece.piece: number for number, piece in by_kind["BYTE"].items()}
    used = {number: (piece.piece, piece.score) for number, piece in (by_kind["NORMAL"] | symbols).items()}
    spec = proto.normalizer_spec
    try:
        return pieces.PieceEncoder(
            used,
            frozenset(symbols),
            [of_bytes[f"<0x{byte:02X}>"] for byte in range(256)] if proto.trainer_spec.byte_fallback else None,
            next(iter(by_kind["UNKNOWN"])),
            pieces.Normalization(
                table=spec.precompiled_charsmap,
                trims=spec.remove_extra_whitespaces,
                dummy=spec.add_dummy_prefix,
                suffix=proto.trainer_spec.treat_whitespace_as_suffix,
                escapes=spec.escape_whitespaces,
            ),
            unigram=_kind_of(proto) == "UNIGRAM",
        )
    except ValueError as error:
        log.info("the library encodes: %s", error)
        return None


def _kind_of(proto: Any) -> str:
    kind: str = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    return kind


def _suits(proto: Any, by_kind: dict[str, dict[int, Any]]) -> bool:
    if len(by_kind["UNKNOWN"]) != 1 or not by_kind["NORMAL"]:
        return False
    if _kind_of(proto) == "UNIGRAM":
        return _version() >= _UNIGRAM_SINCE
    # a merge into a piece that is not used is undone afterwards
    return _kind_of(proto) == "BPE" and not by_kind["UNUSED"]


def _version() -> tuple[int, ...]:
    import sentencepiece

    return tuple(int(part) for part in sentencepiece.__version__.split(".")[:3] if part.isdigit())
