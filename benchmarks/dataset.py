"""Index building, sample fetching and opening: megalm against megatron-core, in alternation, on one synthetic dataset.

    python benchmarks/dataset.py                      (10 million documents, 5 billion tokens; about 4 minutes)
    python benchmarks/dataset.py --documents 200000   (a small one)

Each measurement is a process of its own, so that its peak memory is its own. Peak is what the process held at most
above what it held before, mapped files included. Arrays are compared by hash.
"""

import argparse
import hashlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 2048
SEED = 1234
MEAN_LENGTH = 500


def write_index(prefix: Path, num_documents: int, seed: int = 0) -> int:
    """A dataset of random lengths whose .bin is one hole; the number of tokens."""
    from megalm.data.indexed.format import Header

    lengths = np.random.default_rng(seed).integers(1, 2 * MEAN_LENGTH, num_documents).astype("<i4")
    pointers = np.cumsum(lengths, dtype="<i8") - lengths
    header = Header(dtype=np.dtype("<u2"), num_sequences=num_documents, num_boundaries=num_documents + 1)
    with open(f"{prefix}.idx", "wb") as stream:
        boundaries = np.arange(num_documents + 1, dtype="<i8")
        stream.writelines([header.pack(), lengths.tobytes(), (pointers * 2).tobytes(), boundaries.tobytes()])
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(int(lengths.sum(dtype=np.int64)) * 2)
    return int(lengths.sum(dtype=np.int64))


def write_tokens(prefix: Path, num_documents: int) -> None:
    """A small dataset with random tokens in it, for fetching."""
    num_tokens = write_index(prefix, num_documents)
    np.random.default_rng(1).integers(0, 50000, num_tokens, dtype=np.uint16).tofile(f"{prefix}.bin")


def open_megalm(prefix: str, num_documents: int, num_samples: int) -> Any:
    """megalm's dataset of all documents."""
    from megalm.data.indexed.reader import IndexedDataset
    from megalm.data.samples.gpt_dataset import GPTDataset

    return GPTDataset(IndexedDataset(prefix), range(num_documents), SEQ_LENGTH, num_samples, SEED)


def open_peer(prefix: str, num_documents: int, num_samples: int) -> Any:
    """megatron-core's dataset of all documents."""
    from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset, utils  # noqa: F401 (compiled helpers)

    class Tokenizer:
        vocab_size, eod, pad = 50257, 0, -1
        unique_identifiers: dict[str, str] = {"class": "benchmark"}  # noqa: RUF012
        special_tokens_dict: dict[str, int] = {"eod": 0}  # noqa: RUF012

    config = gpt_dataset.GPTDatasetConfig(
        blend=([prefix], None), split="1,0,0", path_to_cache=f"{prefix}_cache", tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, create_attention_mask=False, eod_mask_loss=False,
        sequence_length=SEQ_LENGTH, random_seed=SEED,
    )  # fmt: skip
    indices = np.arange(num_documents, dtype=np.int32)
    indexed = indexed_dataset.IndexedDataset(prefix)
    return gpt_dataset.GPTDataset(indexed, prefix, indices, num_samples, utils.Split.train, config)


OPEN: dict[str, Callable[[str, int, int], Any]] = {"megalm": open_megalm, "peer": open_peer, "peer+files": open_peer}


def measure_index(who: str, prefix: str, num_documents: int, num_samples: int) -> dict[str, Any]:
    """Seconds and peak bytes of building the index, and the hashes of its arrays."""
    write_index(Path(f"{prefix}_warm"), 1000)
    OPEN[who](f"{prefix}_warm", 1000, 1000)  # imports are not part of it
    if who == "peer":
        np.save = lambda *_, **__: None  # the same work as megalm's: arrays in memory
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    begin = time.perf_counter()
    dataset = OPEN[who](prefix, num_documents, num_samples)
    seconds = time.perf_counter() - begin
    peak = memory("VmHWM") - before
    sample = dataset.sample_index
    arrays = {
        "document": dataset.document_index,
        "sample": sample.as_megatron() if who == "megalm" else sample,
        "shuffle": dataset.shuffle_index,
    }
    hashes = {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}
    return {"seconds": seconds, "peak_mb": peak / 2**20, "arrays": hashes, "samples": len(dataset)}


def measure_fetch(who: str, prefix: str, num_documents: int, num_samples: int) -> dict[str, Any]:
    """Random samples a second, as training rows: tokens, labels, loss mask."""
    dataset = OPEN[who](prefix, num_documents, num_samples)
    if who == "megalm":
        from megalm.objectives.causal import CausalObjective

        objective = CausalObjective()

        def fetch(number: int) -> Any:
            return objective(dataset[number])
    else:
        fetch = dataset.__getitem__
    numbers = np.random.default_rng(2).integers(0, num_samples, 4000).tolist()
    total = sum(int(fetch(number)["tokens"].sum()) for number in numbers[:1000])  # the pages are in memory then
    begin = time.perf_counter()
    for number in numbers:
        fetch(number)
    return {"rate": len(numbers) / (time.perf_counter() - begin), "arrays": total}


def measure_stream(prefix: str, num_documents: int) -> dict[str, Any]:
    """Seconds and peak bytes from nothing to the first sample in file order."""
    from megalm.data.indexed.reader import IndexedDataset
    from megalm.data.samples.stream import StreamDataset

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    indexed = IndexedDataset(prefix, scan=False)
    indexed.vocab_size = 50257
    indexed.check_token_range()
    indexed.fingerprint()
    dataset = StreamDataset(indexed, range(num_documents), SEQ_LENGTH, None, SEED)
    length = len(dataset[len(dataset) // 3].tokens)
    seconds = time.perf_counter() - begin
    assert length == SEQ_LENGTH + 1, "a whole sample"
    return {"seconds": seconds, "peak_mb": (memory("VmHWM") - before) / 2**20, "tokens": indexed.num_tokens}


def write_huge(prefix: Path, num_documents: int, length: int) -> None:
    """A dataset of `num_documents` of `length` tokens whose two files are almost only holes; for opening by its ends.

    The offsets are written where they are looked at: at each document that the id check reads.
    """
    from megalm.data.indexed.format import HEADER, Header

    header = Header(dtype=np.dtype("<u2"), num_sequences=num_documents, num_boundaries=num_documents + 1)
    step = max(1, num_documents // 1024)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(header.pack())
        for document in {0, num_documents - 1, *range(0, num_documents, step)}:
            stream.seek(HEADER.size + 4 * document)
            stream.write(np.int32(length).tobytes())
            stream.seek(HEADER.size + 4 * num_documents + 8 * document)
            stream.write(np.int64(2 * length * document).tobytes())
        stream.seek(header.index_bytes - 8)
        stream.write(np.int64(num_documents).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * length * num_documents)


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def child(*words: object) -> dict[str, Any]:
    """What this script prints when it measures in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_child(words: list[str]) -> None:
    """One measurement, printed as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kind, *rest = words
    if kind == "stream":
        print(json.dumps(measure_stream(rest[0], int(rest[1]))))
    else:
        measure = {"index": measure_index, "fetch": measure_fetch}[kind]
        print(json.dumps(measure(rest[0], rest[1], int(rest[2]), int(rest[3]))))


def compare_index(folder: Path, num_documents: int, repeats: int) -> None:
    """Prints time and peak of the index of two epochs, and whether the arrays are equal."""
    prefix = folder / "large"
    num_tokens = write_index(prefix, num_documents)
    num_samples = int(1.9 * num_tokens) // SEQ_LENGTH
    found: dict[str, list[dict[str, Any]]] = {"megalm": [], "peer": [], "peer+files": []}
    for _ in range(repeats):
        for who, results in found.items():
            results.append(child("index", who, prefix, num_documents, num_samples))
            for path in folder.glob("large_cache/*"):
                path.unlink()
    arrays = {json.dumps(result["arrays"]) for who in ("megalm", "peer+files") for result in found[who]}
    middle = {who: statistics.median(r["seconds"] for r in results) for who, results in found.items()}
    peak = {who: max(r["peak_mb"] for r in results) for who, results in found.items()}
    num_samples = found["megalm"][0]["samples"]
    print(f"index of {num_documents:,} documents, {num_tokens:,} tokens, 2 epochs, {num_samples:,} samples")
    for who in found:
        print(f"  {who:<11} {middle[who]:6.2f} s   peak {peak[who]:6.0f} MB")
    print(f"  speed: {middle['peer'] / middle['megalm']:.2f} times megatron-core's (target 1.5); with its files "
          f"written {middle['peer+files'] / middle['megalm']:.2f} times")  # fmt: skip
    print(f"  peak memory: {peak['megalm'] / peak['peer']:.2f} of megatron-core's (target at most 1)")
    print(f"  arrays equal: {'yes' if len(arrays) == 1 else 'NO'}")


def compare_fetch(folder: Path, repeats: int) -> None:
    """Prints random samples a second."""
    prefix, num_documents = folder / "tokens", 200_000
    write_tokens(prefix, num_documents)
    rates: dict[str, list[float]] = {"megalm": [], "peer": []}
    seen = set()
    for _ in range(repeats):
        for who, results in rates.items():
            result = child("fetch", who, prefix, num_documents, 40_000)
            results.append(result["rate"])
            seen.add(result["arrays"])
    middle = {who: statistics.median(results) for who, results in rates.items()}
    print(f"random samples of {SEQ_LENGTH} tokens a second, same samples: {'yes' if len(seen) == 1 else 'NO'}")
    for who, rate in middle.items():
        print(f"  {who:<11} {rate:8.0f}")
    print(f"  speed: {middle['megalm'] / middle['peer']:.2f} times megatron-core's (target 2)")


def show_stream(folder: Path, num_documents: int, length: int) -> None:
    """Prints the time to the first sample of a huge dataset in file order."""
    prefix = folder / "huge"
    write_huge(prefix, num_documents, length)
    result = child("stream", prefix, num_documents)
    print(
        f"--sampling stream: {result['tokens']:,} tokens in {num_documents:,} documents, opened to the first sample in "
        f"{result['seconds']:.3f} s (target 1), {result['peak_mb']:.0f} MB"
    )


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of the index comparison")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in alternation")
    parser.add_argument(
        "--folder", help="where to put the files (10 GB apparent, 0.5 GB real); default: a temporary one"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        compare_index(folder, args.documents, args.repeats)
        compare_fetch(folder, args.repeats)
        show_stream(folder, 100 * args.documents, 1000)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
