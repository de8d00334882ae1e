"""Whether a dataset is still what it was, byte for byte: by its times, and where these differ by its hash."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from megalm.data.indexed.manifest import manifest_path, read_manifest
from megalm.errors import CheckpointError
from megalm.storage.durable import sha256_of

log = logging.getLogger("megalm")


@dataclass(frozen=True, kw_only=True)
class ContentRecord:
    """What a checkpoint records of the tokens of a dataset besides its fingerprint, which is of a sample of them."""

    modified_ns: int | None = None
    """When PREFIX.bin was last written."""
    sha256: str | None = None
    """Its SHA-256 as its manifest has it; None where there is no manifest."""

    @classmethod
    def of(cls, prefix: str) -> "ContentRecord":
        """What is there now; nothing is hashed.

        Raises:
            DataError: a manifest that is broken.
        """
        stated: dict[str, Any] = (read_manifest(manifest_path(prefix)) or {}).get("bin") or {}
        return cls(modified_ns=os.stat(f"{prefix}.bin").st_mtime_ns, sha256=stated.get("sha256"))

    def check(self, prefix: str) -> None:
        """Compares PREFIX.bin with this record: all of it is hashed where it was written since, as a copy is.

        A record without a hash says nothing.

        Raises:
            CheckpointError: other tokens.
        """
        now = ContentRecord.of(prefix)
        if self.sha256 is None or now.modified_ns == self.modified_ns:
            return
        found = now.sha256
        if found in (None, self.sha256):
            size = os.stat(f"{prefix}.bin").st_size
            log.info("%s.bin was written or copied since the checkpoint: hashing its %.1f GB", prefix, size / 1e9)
            found = sha256_of(f"{prefix}.bin")
        if found != self.sha256:
            raise CheckpointError(
                f"{prefix}.bin is not what the run began with: its SHA-256 is {str(found)[:16]}..., was "
                f"{self.sha256[:16]}...; restore the data, start a new run (another --save), or continue with "
                "--allow-changed-data"
            )
