"""inspect, verify, merge and split: right on good datasets, one clear error on bad ones, and no half-written output."""

import itertools
import json
import resource
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.cli import main
from megalm.data.indexed.format import HEADER
from megalm.data.indexed.manifest import manifest_path
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.tools.inspect import count_lengths, histogram
from megalm.data.tools.split import part_ranges
from megalm.data.tools.verify import verify
from megalm.errors import DataError

TOOLS = ["inspect", "verify", "merge", "split"]


def rich(prefix: Path, seed: int, dtype: str = "uint16", vocab_size: int = 500) -> Path:
    """A dataset with documents of several sequences and documents without any."""
    random = np.random.default_rng(seed)
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for _ in range(12):
            lengths = random.integers(0, 9, size=random.integers(0, 4)).tolist()
            builder.add_document(random.integers(0, vocab_size, size=sum(lengths)), lengths)
        builder.add_document([1, 2, 3])
        builder.finalize()
    return prefix


def content(prefix: Path | str) -> list[list[list[int]]]:
    """Documents of sequences of ids."""
    indexed = IndexedDataset(prefix)
    return [
        [indexed[number].tolist() for number in range(start, stop)]
        for start, stop in itertools.pairwise(indexed.document_indices.tolist())
    ]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that must fail with the exit code of bad data."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 3
    text = capsys.readouterr().err
    assert text.startswith(f"megalm {arguments[0]}: error: ")
    assert "Traceback" not in text
    return text


def command(tool: str, prefix: Path, folder: Path) -> list[str]:
    """A command line that reads `prefix` and would write below `folder`."""
    output = ["--output-prefix", str(folder / "out")]
    return [tool, str(prefix), *{"merge": output, "split": [*output, "--shares", "a=1", "b=1"]}.get(tool, [])]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_merge_and_split_are_inverse_and_equal_megatrons_merge(
    dtype: str, tmp_path: Path, megatron: types.SimpleNamespace
) -> None:
    parts = [rich(tmp_path / name, seed, dtype) for seed, name in enumerate("abc")]
    assert main(["merge", *map(str, parts), "--output-prefix", str(tmp_path / "all")]) == 0
    assert content(tmp_path / "all") == [document for part in parts for document in content(part)]
    peer = megatron.indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "peer.bin"), dtype=np.dtype(dtype).type)
    for part in parts:
        peer.add_index(str(part))
    peer.finalize(str(tmp_path / "peer.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"all{suffix}").read_bytes() == (tmp_path / f"peer{suffix}").read_bytes()
    assert main(["split", str(tmp_path / "all"), "--documents", "x=13", "y=13", "z=rest"]) == 0
    for part, name in zip(parts, "xyz", strict=True):
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"all_{name}{suffix}").read_bytes() == part.with_suffix(suffix).read_bytes()
        theirs = megatron.indexed_dataset.IndexedDataset(str(tmp_path / f"all_{name}"))
        assert [row.tolist() for row in theirs] == [row for document in content(part) for row in document]
    assert main(["verify", *(str(tmp_path / f"all{name}") for name in ("", "_x", "_y", "_z"))]) == 0


def test_merge_takes_a_folder_in_the_order_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(["b", "a", "c.x"]):
        rich(tmp_path / "in" / name, seed)
    assert main(["merge", "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == [d for name in ("a", "b", "c.x") for d in content(tmp_path / "in" / name)]
    (tmp_path / "in" / "c.x.bin").unlink()
    text = error_of(capsys, "merge", tmp_path / "in", "--output-prefix", tmp_path / "two")
    assert "c.x has only one of .bin and .idx" in text
    (tmp_path / "none").mkdir()
    assert "holds no dataset" in error_of(capsys, "merge", tmp_path / "none", "--output-prefix", tmp_path / "two")


@given(
    shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), num_documents=st.integers(1, 10**10),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_shares_cut_into_consecutive_parts_of_the_right_size(shares: list[float], num_documents: int) -> None:
    names = {str(number): share for number, share in enumerate(shares)}
    try:
        ranges = list(part_ranges(names, num_documents, by_shares=True).values())
    except DataError:
        assert min(shares) / sum(shares) * num_documents < 1.001
        return
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == num_documents
    for (start, stop), share in zip(ranges, shares, strict=True):
        assert abs((stop - start) - num_documents * share / sum(shares)) <= 1 + 1e-6 * num_documents


def test_manifests_tell_where_documents_come_from(tmp_path: Path) -> None:
    first, second = rich(tmp_path / "a", 0), rich(tmp_path / "b", 1)
    named = {"type": "X", "identity": "1234", "vocab_size": 500, "eod": 7}
    for prefix in (first, second):
        manifest_path(str(prefix)).write_text(json.dumps({"tokenizer": named, "bin": {"sha256": "5"}}))
    assert main(["merge", str(first), str(second), "--output-prefix", str(tmp_path / "m")]) == 0
    manifest = json.loads((tmp_path / "m.manifest.json").read_text())
    assert manifest["tokenizer"] == named
    assert [entry["prefix"] for entry in manifest["inputs"]] == [str(first), str(second)]
    assert manifest["documents"] == 26
    manifest_path(str(second)).unlink()
    assert main(["merge", str(first), str(second), "--output-prefix", str(tmp_path / "m"), "--overwrite"]) == 0
    assert "tokenizer" not in json.loads((tmp_path / "m.manifest.json").read_text()), "half of it is not known"


def test_other_tokenizers_and_dtypes_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, wide = rich(tmp_path / "a", 0), rich(tmp_path / "b", 1), rich(tmp_path / "c", 2, "int32")
    for prefix, identity in ((first, "1234"), (second, "5678")):
        manifest_path(str(prefix)).write_text(json.dumps({"tokenizer": {"identity": identity}}))
    text = error_of(capsys, "merge", first, second, "--output-prefix", tmp_path / "out")
    assert "was made with tokenizer 1234" in text
    text = error_of(capsys, "merge", first, wide, "--output-prefix", tmp_path / "out")
    assert "c holds int32" in text
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_names_old_missing_and_damaged_files(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.bin").write_bytes(b"")
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    assert "has the old TNTIDX layout" in error_of(capsys, *command(tool, tmp_path / "old", tmp_path))
    rich(tmp_path / "data_text_document", 0)
    text = error_of(capsys, *command(tool, tmp_path / "data", tmp_path))
    assert "did you mean" in text
    assert "data_text_document" in text
    bin_path = tmp_path / "data_text_document.bin"
    bin_path.write_bytes(bin_path.read_bytes()[:-1])
    assert "bin must have" in error_of(capsys, *command(tool, tmp_path / "data_text_document", tmp_path))
    assert not list(tmp_path.glob("out*"))


def damage_offset(idx: bytearray, count: int) -> None:
    struct.pack_into("<q", idx, HEADER.size + 4 * count + 8 * 2, 10)


def damage_lengths(idx: bytearray, count: int) -> None:
    struct.pack_into(
        "<ii",
        idx,
        HEADER.size,
        *(a + d for a, d in zip(struct.unpack_from("<ii", idx, HEADER.size), (1, -1), strict=True)),
    )


def damage_boundary(idx: bytearray, count: int) -> None:
    struct.pack_into("<q", idx, HEADER.size + 12 * count + 8 * 5, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_offset, "sequence 2 must start at byte 60, its offset is 10"),
        (damage_lengths, "sequence 1 must start at byte"),
        (damage_boundary, "document 4 ends before it starts"),
    ],
)
@pytest.mark.parametrize("tool", ["verify", "merge", "split"])
def test_damage_inside_the_index_is_found(
    tool: str, damage: Callable[[bytearray, int], None], message: str, tmp_path: Path,
    write_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prefix = write_dataset(tmp_path / "data", [15] * 20)
    path = tmp_path / "data.idx"
    raw = bytearray(path.read_bytes())
    damage(raw, 20)
    path.write_bytes(raw)
    IndexedDataset(prefix, scan=False)  # looks at sizes and ends only
    assert message in error_of(capsys, *command(tool, prefix, tmp_path))
    assert not list(tmp_path.glob("out*"))


def test_verify_reads_every_id(
    tmp_path: Path, write_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_dataset(tmp_path / "data", [100] * 30_000, dtype="int32", vocab_size=900)
    assert main(["verify", str(prefix)]) == 0
    assert "ids 0 .. 899, no manifest" in capsys.readouterr().out
    assert main(["verify", str(prefix), "--vocab-size", "900"]) == 0
    assert "token id 899 at position 99 of sequence 8 is outside 0 .. 898" in error_of(
        capsys, "verify", prefix, "--vocab-size", "899"
    )
    with open(tmp_path / "data.bin", "r+b") as stream:
        stream.seek(4 * (2_900_000 + 5))
        stream.write(struct.pack("<i", -3))
    assert "token id -3 at position 5 of sequence 29000 is outside 0 and up" in error_of(capsys, "verify", prefix)


def test_verify_compares_with_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = rich(tmp_path / "a", 0)
    assert main(["merge", str(source), "--output-prefix", str(tmp_path / "m")]) == 0
    path = tmp_path / "m.manifest.json"
    good = json.loads(path.read_text())
    assert "manifest and hashes agree" in verify(str(tmp_path / "m"))
    for change, message in [
        ({"documents": 4}, "documents is 13, the manifest says 4"),
        ({"dtype": "int32"}, "dtype is uint16, the manifest says int32"),
        ({"idx": {"sha256": "0"}}, "idx.sha256 is"),
        ({"tokenizer": {"vocab_size": 3}}, "is outside 0 .. 2"),
    ]:
        path.write_text(json.dumps(good | change))
        assert message in error_of(capsys, "verify", tmp_path / "m")
    path.write_text(json.dumps(good))
    raw = bytearray((tmp_path / "m.bin").read_bytes())
    raw[0] ^= 1
    (tmp_path / "m.bin").write_bytes(raw)
    assert "bin.sha256 is" in error_of(capsys, "verify", tmp_path / "m")
    path.write_text("{")
    assert "cannot read" in error_of(capsys, "verify", tmp_path / "m")


def test_verify_reports_every_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = rich(tmp_path / "good", 0), rich(tmp_path / "bad", 1)
    (tmp_path / "bad.bin").write_bytes(b"")
    assert main(["verify", str(bad), str(good), str(tmp_path / "none")]) == 3
    shown = capsys.readouterr()
    assert f"{good}: ok" in shown.out
    assert "bad.bin must have" in shown.err
    assert "none.bin" in shown.err


def test_outputs_are_not_overwritten_unless_asked_and_never_an_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rich(tmp_path / "a", 0)
    shutil.copy(tmp_path / "a.bin", tmp_path / "out.bin")
    assert "exist already" in error_of(capsys, "merge", source, "--output-prefix", tmp_path / "out")
    (tmp_path / "out_b.idx").write_bytes(b"old")
    assert "out_b.idx exist already" in error_of(capsys, *command("split", source, tmp_path))
    assert not (tmp_path / "out_a.bin").exists(), "no part is published without the others"
    assert main([*command("split", source, tmp_path), "--overwrite"]) == 0
    assert content(tmp_path / "out_a") + content(tmp_path / "out_b") == content(source)
    text = error_of(capsys, "merge", source, "--output-prefix", tmp_path / "x" / ".." / "a", "--overwrite")
    assert "is read and cannot be written" in text


@pytest.mark.parametrize("tool", ["merge", "split"])
def test_a_full_disk_publishes_nothing(tool: str, tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    prefix = write_dataset(tmp_path / "data", [1000] * 100)
    done = subprocess.run(
        [sys.executable, "-m", "megalm.cli", *command(tool, prefix, tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "nothing was published" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_killed_tools_leave_nothing_that_is_taken_for_a_dataset(
    tmp_path: Path, write_dataset: Callable[..., Path]
) -> None:
    prefix = write_dataset(tmp_path / "data", [1000] * 100)
    program = (
        "import os, sys; from megalm.cli import main; from megalm.data.indexed.writer import IndexedDatasetBuilder\n"
        "IndexedDatasetBuilder.publish = lambda self: os.kill(os.getpid(), 9)\n"
        "main(sys.argv[1:])"
    )
    line = command("split", prefix, tmp_path)
    assert subprocess.run([sys.executable, "-c", program, *line], timeout=60).returncode == -9
    assert not [path for path in tmp_path.glob("out*") if path.suffix in (".bin", ".idx", ".json")]
    assert main(line) == 0
    assert content(tmp_path / "out_a") + content(tmp_path / "out_b") == content(prefix)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("words", [["a"], ["a=0"], ["a=-1"], ["a=nan"], ["a=inf"], ["=1"], ["a=1", "a=2"], ["a/b=1"]])
@pytest.mark.parametrize("how", ["--shares", "--documents"])
def test_parts_that_make_no_sense_are_refused(
    how: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", str(tmp_path / "none"), how, *words]) == 2
    assert words[-1] in capsys.readouterr().err


@pytest.mark.parametrize("words", [["a=14"], ["a=12"], ["a=13", "b=rest"], ["a=1", "b=2"]])
def test_counts_must_come_out_even(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = rich(tmp_path / "a", 0)
    text = error_of(capsys, "split", source, "--documents", *words)
    assert "the dataset has 13" in text or "part b would have none of the 13 documents" in text


def test_inspect_counts_lengths(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    lengths = [1, 1, 2, 3, 4, 7, 8, 1000, 1023, 1024]
    indexed = IndexedDataset(write_dataset(tmp_path / "data", lengths))
    counts = count_lengths(indexed)
    assert counts.documents[:12].tolist() == [0, 2, 2, 2, 1, 0, 0, 0, 0, 0, 2, 1]
    assert int(counts.tokens.sum()) == sum(lengths)
    assert (counts.shortest, counts.longest) == (1, 1024)
    lines = histogram(indexed)
    assert lines[0] == "tokens a document: 1 to 1,024, mean 307.3"
    assert lines[-1].split()[:3] == ["1,024", "-", "2,047"]
    assert "100.0% 100.0%" in lines[-1]
    many = IndexedDataset(rich(tmp_path / "many", 3))
    documents = content(tmp_path / "many")
    assert int(count_lengths(many).documents[0]) == sum(not any(document) for document in documents)
    assert int(count_lengths(many).tokens.sum()) == many.num_tokens


def test_inspect_shows_ids_or_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetBuilder(tmp_path / "data", "uint16") as builder:
        builder.add_document([*b"two\x1b[31m lines\n", 256])
        builder.end_document()
        builder.add_document([*b"x" * 500, 256])
        builder.finalize()
    assert main(["inspect", str(tmp_path / "data")]) == 0
    shown = capsys.readouterr().out
    assert "3 documents in 2 sequences" in shown
    assert "document 0, 16 tokens: 116 119 111" in shown
    assert main(["inspect", str(tmp_path / "data"), "--tokenizer-type", "ByteLevelTokenizer"]) == 0
    shown = capsys.readouterr().out
    assert "document 0, 16 tokens: two\\x1b[31m lines\\n [end of document]" in shown
    assert "document 1, 0 tokens: \n" in shown
    assert f"document 2, 501 tokens: {'x' * 120} ..." in shown
    assert main(["inspect", str(tmp_path / "data"), "--documents", "0"]) == 0
    assert "document 0" not in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "data"), "--tokenizer-type", "HF"]) == 2
    assert "--tokenizer-type HF" in capsys.readouterr().err


def test_inspect_refuses_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = rich(tmp_path / "a", 0)
    manifest_path(str(source)).write_text(json.dumps({"tokenizer": {"identity": "1234", "vocab_size": 500}}))
    assert "was made with tokenizer 1234" in error_of(
        capsys, "inspect", source, "--tokenizer-type", "ByteLevelTokenizer"
    )


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    prefix = write_dataset(tmp_path / "data", [8_000_000, 8_000_000])
    tracemalloc.start()
    for tool in TOOLS:
        assert main(command(tool, prefix, tmp_path)) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000, "the dataset has 32 MB"
