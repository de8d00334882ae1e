"""Files that hold something else than their names say: told once, with what to do, before any line is counted."""

from megalm.data.text.compression import COMPRESSIONS

SNIFFED_BYTES = 4096
"""What is looked at of a file."""
_MAGIC = {
    b"\x1f\x8b": ("gzip", "give it a name that ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "give it a name that ends in .zst"),
    b"PAR1": ("Parquet", "give it a name that ends in .parquet"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE"),
    b"PK\x03\x04": ("zip", "unpack it"),
    b"BZh": ("bzip2", "unpack it"),
    b"\xfd7zXZ": ("xz", "unpack it"),
}
"""First bytes to (what they tell, what to do)."""


def problem_of(name: str, start: bytes, *, is_table: bool, is_json: bool) -> str | None:
    """What a file named `name`, which begins with `start`, holds in place of what its name says; None if it does not.

    Args:
        is_table, is_json: what its name says: Parquet, JSON lines; else it is text.
    """
    if is_table or name.lower().endswith(tuple(COMPRESSIONS)):
        return None  # their readers say what is wrong
    for magic, (kind, advice) in _MAGIC.items():
        if start.startswith(magic):
            return f"it holds {kind}, and its name says otherwise: {advice}"
    if len(start) >= 64 and not start.strip(b"\0"):
        return f"it holds zeros ({len(start)} to begin with), as an interrupted copy leaves them: copy it again"
    if start[1:64:2].count(0) > 24 or start[:64:2].count(0) > 24:
        return "it holds UTF-16: iconv -f UTF-16 -t UTF-8 FILE"
    if not is_json:
        return None
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith(b"[") and first[1:].lstrip()[:1] in (b"", b"{"):  # [1] is a line that is no object
        return "it holds one JSON array, not a JSON object a line: jq -c '.[]' FILE"
    if first.split(b"\n", 1)[0].strip() == b"{":
        return "it holds JSON over several lines, not a JSON object a line: jq -c . FILE"
    return None
