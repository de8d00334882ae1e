"""PREFIX.manifest.json beside a dataset: where its tokens come from."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalm.errors import DataError

_COPY_AGAIN = "copy it again, or delete it to go without its checks"


class _Facts(BaseModel):
    """What must have its type where it is there; more may stand beside it."""

    model_config = ConfigDict(extra="allow", strict=True)


class _FileFacts(_Facts):
    bytes: int | None = Field(None, ge=0)
    sha256: str | None = None


class _TokenizerFacts(_Facts):
    type: str | None = None
    identity: str | None = None
    vocab_size: int | None = Field(None, ge=1)
    eod: int | None = Field(None, ge=0)


class _Input(_Facts):
    path: str | None = None
    prefix: str | None = None


class _OptionFacts(_Facts):
    append_eod: bool | None = None


class _Manifest(_Facts):
    fingerprint: str | None = None
    inputs: list[_Input] = []
    options: _OptionFacts | None = None
    tokenizer: _TokenizerFacts | None = None
    documents: int | None = Field(None, ge=0)
    sequences: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)
    dtype: str | None = None
    bin: _FileFacts | None = None
    idx: _FileFacts | None = None


def manifest_path(prefix: str) -> Path:
    """The manifest of the dataset `prefix`."""
    return Path(f"{prefix}.manifest.json")


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """A manifest as it is stored: JSON, indented, keys in the given order."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`; None when there is none (Megatron writes none).

    Raises:
        DataError: it cannot be read, is no JSON object, or says something that has not the type of its name.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        _Manifest.model_validate(content)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise DataError(f"{path} is no manifest of a dataset: {where}: {problem['msg']}; {_COPY_AGAIN}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deep for a manifest; {_COPY_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {_COPY_AGAIN}") from error
    found: dict[str, Any] = content
    return found


def check_tokenizer(prefix: str, identity: str | None) -> None:
    """Checks that the dataset `prefix` was made with the tokenizer `identity`; silent when either is unknown.

    Raises:
        DataError: another tokenizer.
    """
    recorded = ((read_manifest(manifest_path(prefix)) or {}).get("tokenizer") or {}).get("identity")
    if identity is not None and recorded is not None and recorded != identity:
        raise DataError(
            f"{prefix} was made with tokenizer {recorded[:16]}..., the run's is {identity[:16]}... (SHA-256 of "
            "file and type); give the same --tokenizer-type and --tokenizer-model, or preprocess the text again"
        )


def ends_documents(prefix: str) -> bool | None:
    """Whether the documents of a dataset end with an end-of-document token; None where no manifest tells."""
    told: bool | None = ((read_manifest(manifest_path(prefix)) or {}).get("options") or {}).get("append_eod")
    return told
