"""Personal data and secrets out of texts: e-mail and IP addresses, phone numbers, keys.

Patterns of keys come from detect-secrets, phone numbers are found by phonenumbers (Google's libphonenumber), IP
addresses are checked by the standard library.
"""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from megalm.errors import PlatformError

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9_.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_JWT = r"eyJ[\w-]+=*\.[\w-]+=*(?:\.[\w+/-]+=*){0,3}"
"""All parts of a JSON web token, signed or encrypted; the package's pattern leaves the signature."""
_PHONE_HINT = re.compile(r"(?<![\w.])\+?\(?(?!\d{4}-\d\d-\d\d)\d[\d ()./\-]{6,}\d(?!\w)")
"""Digits that could be a number, and no date as 2026-01-31."""
_KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
)
_KEY_MODULES = (
    "aws", "azure_storage_key", "discord", "github_token", "gitlab_token", "jwt", "mailchimp", "npm", "openai",
    "pypi_token", "sendgrid", "slack", "square_oauth", "stripe", "telegram_token", "twilio",
)  # fmt: skip
"""Plugins of detect-secrets that know a service's keys by their form; those that guess from entropy are left out."""


def redact(text: str, counts: Counter[str]) -> str:
    """`text` with <KEY>, <EMAIL>, <IP_ADDRESS> and <PHONE_NUMBER> in place of such; counts how many of each.

    Raises:
        PlatformError: a package that finds them is not installed.
    """
    for name, step in _steps():
        text, found = step(text)
        if found:
            counts[name] += found
    return text


def versions() -> dict[str, str]:
    """The versions on which the result of `redact` depends.

    Raises:
        PlatformError: a package is not installed.
    """
    detect_secrets, phonenumbers = _packages()
    return {"detect-secrets": detect_secrets.VERSION, "phonenumbers": phonenumbers.__version__}


@functools.cache
def _packages() -> tuple[Any, Any]:
    try:
        import detect_secrets.__version__ as detect_secrets
        import phonenumbers
    except ImportError as error:
        raise PlatformError(
            f"--redact-pii needs the package {error.name}; `pip install detect-secrets phonenumbers`"
        ) from error
    return detect_secrets, phonenumbers


@functools.cache
def _steps() -> tuple[tuple[str, Callable[[str], tuple[str, int]]], ...]:
    return (
        ("keys", _redact_keys),
        ("e-mail addresses", lambda text: _EMAIL.subn("<EMAIL>", text) if "@" in text else (text, 0)),
        ("IP addresses", _redact_addresses),
        ("phone numbers", _redact_phones),
    )


@functools.cache
def _key_pattern() -> re.Pattern[str]:
    import importlib

    from detect_secrets.plugins.base import RegexBasedDetector

    _packages()
    patterns = [_JWT]
    for name in _KEY_MODULES:
        for plugin in vars(importlib.import_module(f"detect_secrets.plugins.{name}")).values():
            if isinstance(plugin, type) and issubclass(plugin, RegexBasedDetector) and plugin is not RegexBasedDetector:
                denylist: Any = plugin.denylist  # a tuple there, a property in the base class
                patterns += [pattern.pattern for pattern in denylist]
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def _redact_keys(text: str) -> tuple[str, int]:
    blocks = 0
    if "PRIVATE KEY" in text:
        text, blocks = _KEY_BLOCK.subn("<KEY>", text)
    text, keys = _key_pattern().subn("<KEY>", text)
    return text, blocks + keys


def _redact_addresses(text: str) -> tuple[str, int]:
    found = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal found
        try:
            address = ipaddress.ip_address(match.group())
        except ValueError:
            return match.group()
        if address.is_unspecified or address.is_loopback:  # nobody's
            return match.group()
        if address.version == 6 and not _is_somebodys(match.group()):
            return match.group()
        found += 1
        return "<IP_ADDRESS>"

    for pattern in (_IPV4, _IPV6):
        text = pattern.sub(replaced, text)
    return text, found


def _is_somebodys(text: str) -> bool:
    """Whether an IPv6 address is of a kind that is given to machines: in code `x[::2]` and `a::b` are well-formed too.

    Global unicast (2000::/3) of three groups or more; unique local (fc00::/7) and link-local (fe80::/10) of two.
    """
    groups = [group for group in text.split(":") if group]
    if len(groups) < 2 or len(groups[0]) < 4:
        return False
    first = int(groups[0], 16)
    return (first >> 13 == 1 and len(groups) > 2) or first >> 9 == 0x7E or first >> 6 == 0x3FA


def _redact_phones(text: str) -> tuple[str, int]:
    _, phonenumbers = _packages()
    strict = phonenumbers.Leniency.STRICT_GROUPING
    pieces, position, found = [], 0, 0
    for hint in _PHONE_HINT.finditer(text):
        # The library takes its time, so it sees only what has the digits of a number.
        for match in phonenumbers.PhoneNumberMatcher(hint.group(), "US", strict):
            pieces += [text[position : hint.start() + match.start], "<PHONE_NUMBER>"]
            position = hint.start() + match.end
            found += 1
    return ("".join([*pieces, text[position:]]), found) if found else (text, 0)
