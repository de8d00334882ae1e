"""What looks like a secret, by its name or by its form: it never goes into batch scripts, logs or a run folder."""

import re

_NAME = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|BEARER|JWT|SIGNATURE|(_|^)(PAT|PW|PWD|PSW|SAS|PIN)\d*$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""user:password, or a token, before the host."""
_VALUE = re.compile(
    r"\b(hf_\w{20,}|gh[opsru]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{15,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|"
    r"xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)|(?<=[?&])(?i:token|key|secret|password|sig)=[^&\s]+"
)
"""Tokens by their issuers' forms, and those in the query of an address."""


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or setting may hold a secret."""
    return _NAME.search(name) is not None or holds_secret(value)


def holds_secret(text: str) -> bool:
    """Whether a text has a secret in it."""
    return masked(text) != text


def masked(text: str) -> str:
    """The text with *** in place of each secret in it."""
    return _VALUE.sub("***", _IN_URL.sub("***", text))
