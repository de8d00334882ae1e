"""JSON and YAML of strangers: whatever stands there, the answer is a value or one error, and it comes soon."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.config.merging.load import load_config
from megalm.data.tokenizers.base import read_file
from megalm.errors import ConfigError, DataError, MegalmError
from megalm.launching.commands import read_hostfile
from megalm.launching.site import read_site
from megalm.monitor.sinks.jsonl import read_metrics
from megalm.storage.documents import DocumentError, parse_json, parse_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "deep"),
        ('{"a": ' * 70 + "1" + "}" * 70, "deep"),
        ('{"a": 1, "a": 2}', '"a" stands twice'),
        ("NaN", "NaN is not a JSON number"),
        ("1e999", "too large a number"),
        ('"\\ud800"', "not UTF-8"),
        (b"\xff", "not UTF-8"),
        ("9" * 5000, "not JSON"),
        ("", "not JSON"),
        ('{"a": 1,}', "not JSON"),
    ],
)
def test_json_that_is_none_is_one_error(text: str | bytes, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        parse_json(text)


def test_json_that_is_some_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "\U0001f600"], "b": {"c": -1}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json('{"a": 1, "a": 2}', repeats=True) == {"a": 2}
    assert parse_json("[" * 64 + "]" * 64) is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 2000, "deep"),
        ("{a: " * 100 + "1" + "}" * 100, "deep"),
        (BOMB, "stands for more than"),
        (MERGES, "stands for more than"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("? [1]\n: 2", "unhashable"),
        ("a: !!timestamp soon", "not what its tag"),
        ("a: 2001-99-99", "not what its tag"),
        ("a: !!int x", "not what its tag"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\0", "special characters"),
        ("1:" * 1000 + "1", "digits"),
        ("a: *b", "undefined alias"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_yaml_that_is_none_is_one_error(text: str, said: str) -> None:
    begin = time.process_time()
    with pytest.raises(DocumentError, match=said):
        parse_yaml(text.encode())
    assert time.process_time() - begin < 5


def test_a_file_without_end_is_no_file_of_settings() -> None:
    with pytest.raises(ConfigError, match="/dev/zero cannot be read: it has more than 512 kB"):
        load_config(["--config", "/dev/zero"])
    with pytest.raises(DataError, match="tokenizer_model=/dev/zero is a device"):
        read_file("/dev/zero")


SEEDS = {
    "recipe": "model:\n  num_layers: 2\n  hidden_size: &h 64\nengine:\n  deepspeed_config:\n    zero_optimization: "
    "{stage: 1}\ndata:\n  data_path: [a, 0.5]\ntraining: {lr: 3e-4, seed: *h}\n",
    "json": '{"train_batch_size": 8, "bf16": {"enabled": true}, "zero_optimization": {"stage": 1, "x": [1, 2.5]}, '
    '"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}}',
    "site": "partition: gpu\nsbatch: [--exclusive]\nenvironment: {NCCL_DEBUG: INFO, X: 1}\nsetup: |\n  module load\n",
    "hosts": "node1 slots=8\n# a comment\nnode2 slots=4\n",
    "metrics": '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n',
}
"""What is read, of each kind."""
PIECES = (
    "[", "]", "{", "}", ":", ",", '"', "'", "&a", "*a", "!!int ", "!!binary ", "<<: ", "\n", "  ", "\t", "- ", "? ",
    "|", "#", "%", "\0", "\ufeff", "\udc00", "é", "null", "true", "1e999", "-1", "0x7f", "1_0", "9" * 30, "\\ud800",
    "..", "~", "=", "@",
)  # fmt: skip


def mutant(text: str, source: random.Random) -> str:
    """The text with one to four faults."""
    for _ in range(source.randint(1, 4)):
        at, end = sorted(source.randrange(len(text) + 1) for _ in range(2))
        kind = source.randrange(4)
        if kind == 0:
            text = text[:at] + source.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[min(end, at + 12) :]
        elif kind == 2:
            text = text[:at] + text[at:end] * 2 + text[end:]
        else:
            text = text[:at] + source.choice(PIECES) + text[at + 1 :]
    return text


def read(kind: str, path: Path) -> Any:
    if kind == "recipe":
        return load_config(["--config", str(path)])
    if kind == "json":
        return load_config(["--deepspeed_config", str(path), "--mock-data"])
    return {"site": lambda: read_site(str(path), {}), "hosts": lambda: read_hostfile(path)}.get(
        kind, lambda: read_metrics(path)
    )()


@pytest.mark.parametrize("kind", SEEDS)
def test_mutants_give_a_value_or_one_error(tmp_path: Path, kind: str) -> None:
    source, path = random.Random(f"mutants of {kind}"), tmp_path / "mutant"
    for number in range(80 if kind in ("recipe", "json") else 250):
        text = mutant(SEEDS[kind], source)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        begin = time.process_time()
        try:
            read(kind, path)
        except MegalmError:
            continue
        except Exception as error:
            raise AssertionError(f"mutant {number} of {kind}: {text!r}") from error
        assert time.process_time() - begin < 5, f"mutant {number} of {kind}: {text!r}"
