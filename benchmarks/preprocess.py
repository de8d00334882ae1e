"""Preprocessing speed and memory against Megatron-DeepSpeed's `tools/preprocess_data.py`, in one run.

    python benchmarks/preprocess.py [--megatron-deepspeed DIR] [--size-mb 100] [--rounds 2] [--memory-mb 100 2000]
    python benchmarks/preprocess.py --rounds 0 --memory-mb --mixed-mb 20      (the mixed text alone)

Prints MB/s of input as wall time and as CPU time (user and system, of all processes), which other load on the machine
disturbs less, the ratios, and whether .bin and .idx are equal byte for byte (with DIR for both sentencepiece
tokenizers); then text of many scripts with normalizing models, BPE and unigram, against sentencepiece's own `encode`
with as many threads, in turns: reading and writing are not counted there, and here they are, with and without the start
of the command; then peak memory for inputs of the given sizes. Without DIR the peer is a loop of the same design,
written here and named so: `multiprocessing.Pool.imap` over lines, one writer, megatron-core's builder.

DIR is a checkout of https://github.com/deepspeedai/Megatron-DeepSpeed; its script needs the package `six`. Documents
get no end-of-document token with DIR: that script counts the token in .bin but not in .idx.
"""

import argparse
import filecmp
import itertools
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

PIECE_CHARS = 4000
_processor: Any = None


def make_input(folder: Path, size_mb: float) -> Path:
    """JSON lines of `size_mb` MB: the standard library's text, in documents of 4,000 characters, none twice."""
    source = folder / "corpus.jsonl"
    if not source.exists():
        megalm("corpus", "--output", str(source), "--size-mb", "30")
    path = folder / f"input-{size_mb:g}.jsonl"
    texts = [json.loads(line)["text"] for line in source.read_bytes().splitlines()]
    written, turn = 0, 0
    with open(path, "wb") as stream:
        while written < size_mb * 1e6:
            for text in texts:
                for start in range(turn * 17, len(text), PIECE_CHARS):
                    line = json.dumps({"text": f"{text[start : start + PIECE_CHARS]} {turn}"}) + "\n"
                    written += stream.write(line.encode())
                if written >= size_mb * 1e6:
                    break
            turn += 1
    return path


def megalm(*arguments: str) -> None:
    """Runs a megalm command."""
    subprocess.run([sys.executable, "-m", "megalm.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


GPT = "GPTSentencePieceTokenizer"


def preprocess(source: Path, model: Path, output: Path, workers: int, *flags: str, kind: str = GPT) -> None:
    """`megalm preprocess`."""
    tokenizer = ("--tokenizer-type", kind, "--tokenizer-model", str(model))
    out = ("--output-prefix", str(output), "--overwrite", "--workers", str(workers))
    megalm("preprocess", "--input", str(source), *tokenizer, *out, *flags)


def megatron_deepspeed(folder: Path, source: Path, model: Path, output: Path, workers: int, kind: str = GPT) -> None:
    """The peer itself."""
    command = [sys.executable, str(folder / "tools" / "preprocess_data.py"), "--input", str(source)]
    tokenizer = ["--tokenizer-type", kind, "--tokenizer-model", str(model)]
    out = ["--output-prefix", str(output), "--workers", str(workers), "--log-interval", "1000000"]
    done = subprocess.run([*command, *tokenizer, *out], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-2000:]}")


def _load(model: str) -> None:
    import sentencepiece

    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: str) -> list[int]:
    ids: list[int] = _processor.EncodeAsIds(json.loads(line)["text"])
    return [*ids, _processor.eos_id()] if ids else ids


def same_design(source: str, model: str, output: str, workers: int) -> None:
    """The peer's design: line by line through `imap`, every token list pickled to one writer."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load(model)
    builder = IndexedDatasetBuilder(f"{output}_text_document.bin", DType.optimal_dtype(_processor.GetPieceSize()))
    with open(source, encoding="utf-8") as lines, multiprocessing.Pool(workers, _load, (model,)) as pool:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{output}_text_document.idx")


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds of `work`, which runs in child processes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_memory_mb(work: Callable[[], None]) -> float:
    """Peak of the sum over all child processes (proportional set size: shared pages count once), in MB."""
    peak, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return peak


def compare_speed(arguments: argparse.Namespace, folder: Path, model: Path) -> None:
    """Rounds of every contender in turn; the fastest round of each counts."""
    source = make_input(folder, arguments.size_mb)
    workers, size_mb = arguments.workers, source.stat().st_size / 1e6
    own = [sys.executable, __file__, "--same-design", str(source), str(model), str(folder / "peer"), str(workers)]
    eod = ("--append-eod",)
    if arguments.megatron_deepspeed:
        root, eod = Path(arguments.megatron_deepspeed), ()
        peer_name = "Megatron-DeepSpeed preprocess_data.py"
        peer = lambda: megatron_deepspeed(root, source, model, folder / "peer", workers)  # noqa: E731
    else:
        peer_name = "a loop of Megatron-DeepSpeed's design"
        peer = lambda: subprocess.run(own, check=True, stdout=subprocess.DEVNULL) and None  # noqa: E731
    contenders = {
        peer_name: peer,
        "megalm": lambda: preprocess(source, model, folder / "auto", workers, *eod),
        "megalm --encoder library": lambda: preprocess(
            source, model, folder / "library", workers, "--encoder", "library", *eod
        ),
    }
    rounds = [{name: timed(work) for name, work in contenders.items()} for _ in range(arguments.rounds)]
    best = {name: [min(r[name][kind] for r in rounds) for kind in (0, 1)] for name in contenders}
    print(f"{size_mb:.0f} MB of JSON lines, 16,000 ids, {workers} workers, best of {arguments.rounds} rounds")
    print("targets: 5 x wall, and 1.1 x with the library's encoder")
    for name, (wall, cpu) in best.items():
        ratios = f"{best[peer_name][0] / wall:.2f} x wall, {best[peer_name][1] / cpu:.2f} x CPU"
        print(f"{name:40} {size_mb / wall:7.1f} MB/s wall {size_mb / cpu:7.1f} MB/s a core | {ratios}")
    for name in ("auto", "library"):
        print_equality(folder, name, "peer")
    if arguments.megatron_deepspeed:
        source, kind = make_input(folder, min(5, arguments.size_mb)), "SentencePieceTokenizer"
        megatron_deepspeed(root, source, model, folder / "peer", workers, kind)
        preprocess(source, model, folder / kind, workers, kind=kind)
        print_equality(folder, kind, "peer")


def mixed_words(draw: random.Random) -> list[list[str]]:
    """Words of six scripts: with vowel signs, harakat, decomposed accents, half-width kana; and emoji with joiners."""

    def words(letters: str, marks: str, share: float, longest: int) -> list[str]:
        letter = lambda: draw.choice(letters) + (draw.choice(marks) if draw.random() < share else "")  # noqa: E731
        return ["".join(letter() for _ in range(draw.randint(1, longest))) for _ in range(15_000)]

    def span(first: int, last: int) -> str:
        return "".join(map(chr, range(first, last + 1)))

    return [
        words(span(0x915, 0x939), "\u093e\u093f\u0940\u0941\u0947\u094d\u093c\u0902", 0.7, 4),
        words(span(0x627, 0x63A) + span(0x641, 0x64A), "\u064b\u064e\u0650\u0651\u0652", 0.2, 6),
        words(span(0x4E00, 0x59FF), "", 0.0, 3),
        words(span(0x3041, 0x3096) + span(0xFF66, 0xFF9F), "", 0.0, 6),
        words(span(0x61, 0x7A), "\u0300\u0301\u0303\u0308\u0327", 0.06, 9),
        words(span(0xAC00, 0xB3FF), "", 0.0, 3),
        ["\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea"],
    ]


def make_mixed(folder: Path, size_mb: float) -> Path:
    """JSON lines of `size_mb` MB of text in many scripts, mixed within each document; words by Zipf's law, about."""
    draw, path = random.Random(7), folder / f"mixed-{size_mb:g}.jsonl"
    scripts, written = mixed_words(draw), 0
    with open(path, "wb") as stream:
        while written < size_mb * 1e6:
            parts = []
            for _ in range(draw.randint(5, 40)):
                own = draw.choice(scripts)
                blank = "" if own in (scripts[2], scripts[3]) else " "
                picked = (own[int(len(own) * draw.random() ** 4)] for _ in range(draw.randint(3, 20)))
                parts.append(blank.join(picked) + draw.choice([". ", "\u3002", ", ", "\n"]))
            written += stream.write((json.dumps({"text": "".join(parts)}, ensure_ascii=False) + "\n").encode())
    return path


def encode_by_sentencepiece(source: str, model: str, threads: int) -> None:
    """Prints the seconds that sentencepiece takes for all documents of a file."""
    import sentencepiece

    with open(source, encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    begin = time.perf_counter()
    processor.encode(documents, num_threads=threads)
    print(time.perf_counter() - begin)


def train_mixed(source: Path, model: Path, kind: str) -> None:
    """A normalizing model with byte fallback of the first documents of a file."""
    import sentencepiece

    with open(source, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 1500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_prefix=str(model.with_suffix("")), vocab_size=16000, hard_vocab_limit=False, model_type=kind,
        byte_fallback=True, max_sentence_length=1 << 20, minloglevel=2,
    )  # fmt: skip


def compare_mixed(arguments: argparse.Namespace, folder: Path) -> None:
    """Text of many scripts with sentencepiece's default normalization: megalm and sentencepiece in turn."""
    source, workers = make_mixed(folder, arguments.mixed_mb), arguments.workers
    size_mb, start = source.stat().st_size / 1e6, make_mixed(folder, 0.001)
    print(f"{size_mb:.0f} MB of mixed text, nmt_nfkc, {workers} threads or workers (target 3 x)")
    for kind in ("bpe", "unigram"):
        model = folder / f"mixed-{kind}.model"
        if not model.exists():
            train_mixed(source, model, kind)
        own = [sys.executable, __file__, "--by-sentencepiece", str(source), str(model), str(workers)]
        rounds = []
        for _ in range(max(2, arguments.rounds)):
            done = subprocess.run(own, check=True, capture_output=True, text=True)
            walls = [timed(partial(preprocess, text, model, folder / "mixed", workers))[0] for text in (source, start)]
            rounds.append((float(done.stdout), walls[0], walls[0] - walls[1]))
        best = [min(walls) for walls in zip(*rounds, strict=True)]
        for name, wall in zip(("sentencepiece", "megalm", "megalm after its start"), best, strict=True):
            print(f"{kind:8} {name:32} {size_mb / wall:7.1f} MB/s wall | {best[0] / wall:.2f} x wall")


def print_equality(folder: Path, *names: str) -> None:
    """Prints whether two datasets are equal byte for byte."""
    for end in ("bin", "idx"):
        left, right = (folder / f"{name}_text_document.{end}" for name in names)
        print(f"{names[0]}: .{end} {'equal to the peer' if filecmp.cmp(left, right, False) else 'DIFFERS'}")


def measure_memory(arguments: argparse.Namespace, folder: Path, model: Path) -> None:
    """Peak memory at each size of input, and how it grows."""
    peaks = []
    for size_mb in arguments.memory_mb:
        source = make_input(folder, size_mb)
        peaks.append(peak_memory_mb(partial(preprocess, source, model, folder / "memory", arguments.workers)))
        processes = f"{arguments.workers} workers and the parent together"
        print(f"peak memory of megalm at {size_mb:,.0f} MB of input: {peaks[-1]:.0f} MB, {processes} (target 1,000)")
        source.unlink()
    if len(peaks) > 1:
        print(
            f"the largest input takes {peaks[-1] / peaks[0]:.2f} times the memory of the smallest (target 1: no growth)"
        )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-deepspeed", metavar="DIR", help="A checkout of Megatron-DeepSpeed.")
    parser.add_argument("--size-mb", type=float, default=100.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--memory-mb",
        type=float,
        nargs="*",
        default=[100, 2000],
        help="Sizes at which to measure memory; none: do not.",
    )
    parser.add_argument("--mixed-mb", type=float, default=60.0, help="Size of the mixed text; 0: none.")
    parser.add_argument("--folder", help="Where input and output lie (default: a temporary folder).")
    parser.add_argument("--same-design", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--by-sentencepiece", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.by_sentencepiece:
        encode_by_sentencepiece(*arguments.by_sentencepiece[:2], int(arguments.by_sentencepiece[2]))
        return
    if arguments.same_design:
        same_design(*arguments.same_design[:3], int(arguments.same_design[3]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(arguments.folder or temporary)
        make_input(folder, 1)
        corpus = str(folder / "corpus.jsonl")
        model = folder / "tokenizer.model"
        if not model.exists():
            megalm(
                "train-tokenizer",
                "--input",
                corpus,
                "--output-prefix",
                str(folder / "tokenizer"),
                "--vocab-size",
                "16000",
            )
        if arguments.rounds:
            compare_speed(arguments, folder, model)
        if arguments.mixed_mb:
            compare_mixed(arguments, folder)
        measure_memory(arguments, folder, model)


if __name__ == "__main__":
    main()
