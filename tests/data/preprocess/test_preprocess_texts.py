"""What happens to a text before it becomes tokens: cleaning, redaction, sentences."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.preprocess.filters import sentences
from megalm.data.preprocess.filters.clean import clean
from megalm.data.preprocess.filters.redact import redact


@pytest.mark.parametrize(
    ("text", "cleaned", "change"),
    [
        ("a\r\nb\rc", "a\nb\nc", "line ends"),
        ("a\0b\x1bc\x7f\ufeff\td\n", "abc\td\n", "control characters removed"),
        ("cafe\u0301", "caf\u00e9", "brought to NFC"),
        ("plain \u65e5\u672c", "plain \u65e5\u672c", None),
    ],
)
def test_texts_are_cleaned_and_changes_counted(text: str, cleaned: str, change: str | None) -> None:
    counts: Counter[str] = Counter()
    assert clean(text, counts) == cleaned
    assert counts == ({change: 1} if change else {})


def test_broken_encodings_are_repaired() -> None:
    pytest.importorskip("ftfy")
    counts: Counter[str] = Counter()
    assert clean("schÃ¶n", counts) == "schön"
    assert counts == {"broken encoding repaired": 1}


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text, Counter())
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t\x85" for c in once)


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PII = [
    ("write to joe.doe+x@mail.example.com, now", "write to <EMAIL>, now", "e-mail addresses"),
    ("host 8.8.4.4:80 is up", "host <IP_ADDRESS>:80 is up", "IP addresses"),
    ("at 2001:db8::8a2e:370:7334.", "at <IP_ADDRESS>.", "IP addresses"),
    ("at fe80::1%eth0", "at <IP_ADDRESS>%eth0", "IP addresses"),
    ("call (415) 555-2671 or so", "call <PHONE_NUMBER> or so", "phone numbers"),
    ("call +44 20 7946 0958.", "call <PHONE_NUMBER>.", "phone numbers"),
    ("key AKIAIOSFODNN7EXAMPLE!", "key <KEY>!", "keys"),
    ("ghp_" + "a1B2" * 9, "<KEY>", "keys"),
    (f"token {JWT}. Next", "token <KEY>. Next", "keys"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nxyz\n-----END RSA PRIVATE KEY-----\nend", "<KEY>\nend", "keys"),
]


@pytest.mark.parametrize(("text", "redacted", "kind"), PII)
def test_personal_data_and_keys_are_replaced_and_counted(text: str, redacted: str, kind: str) -> None:
    pytest.importorskip("phonenumbers")
    pytest.importorskip("detect_secrets")
    counts: Counter[str] = Counter()
    assert redact(text, counts) == redacted
    assert counts == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4.5 of 2026-01-31 10:20:30", "pi is 3.14159265358979", "f(a)@g", "127.0.0.1 and ::1",
        "300.1.2.3",
        "x[::2]; y[1::2]; return ::add(a); use a::{b}", "dead::beef::f() + abc::def; face::c", "x[2000::3] and [::-1]",
        "00:1a:2b:3c:4d:5e and aa:bb:cc:dd:ee:ff:00:11", "fe80:: is a prefix", "std::cafe::bad::a",
    ],
)  # fmt: skip
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    pytest.importorskip("phonenumbers")
    pytest.importorskip("detect_secrets")
    assert redact(text, Counter()) == text


def test_sentences_are_those_of_punkt() -> None:
    pytest.importorskip("nltk")
    text = "Mr. Smith came.  He left!\nDid he? Yes."
    assert sentences.split(text, "english", keep_newlines=False) == ["Mr. Smith came.", "He left!", "Did he?", "Yes."]
    assert "".join(sentences.split(text, "english", keep_newlines=True)) == text
