"""PREFIX.manifest.json beside a dataset: where its tokens come from."""

import json
from pathlib import Path
from typing import Any

from megalm.errors import DataError


def manifest_path(prefix: str) -> Path:
    """The manifest of the dataset `prefix`."""
    return Path(f"{prefix}.manifest.json")


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """A manifest as it is stored: JSON, indented, keys in the given order."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`; None when there is none (Megatron writes none).

    Raises:
        DataError: it cannot be read as a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; copy it again, or delete it to go without its checks") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object; copy it again, or delete it to go without its checks")
    return content


def check_tokenizer(prefix: str, identity: str | None) -> None:
    """Checks that the dataset `prefix` was made with the tokenizer `identity`; silent when either is unknown.

    Raises:
        DataError: another tokenizer.
    """
    recorded = (read_manifest(manifest_path(prefix)) or {}).get("tokenizer", {}).get("identity")
    if identity is not None and recorded is not None and recorded != identity:
        raise DataError(
            f"{prefix} was made with tokenizer {recorded[:16]}..., the run's is {identity[:16]}... (SHA-256 of "
            "file and type); give the same --tokenizer-type and --tokenizer-model, or preprocess the text again"
        )
