"""Speed and memory of `megalm convert` beside `cp` on the same disk: a random Llama 3.2 1B in bf16, both ways.

    python benchmarks/convert.py [--recipe launch/recipes/llama3-1b.yaml] [--layers N] [--folder DIR]

Speed is bytes read and written by the second, for `cp` those of a copy of what the conversion writes; both end when the
bytes are on disk. Each conversion is a process of its own with --no-check. Its peak memory is what it allocates
(`RssAnon`): pages of the files, which the system may drop, do not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.checkpoint.streaming import write_tensors
from megalm.config.hugging_face import architecture_of, write_settings
from megalm.config.merging.load import load_config
from megalm.config.model import ModelConfig


def main() -> None:
    """Make the model, convert it there and back, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="launch/recipes/llama3-1b.yaml", metavar="FILE", help="the model")
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers of it")
    parser.add_argument("--folder", metavar="DIR", help="where to work; 15 GB for 1B parameters (default: temporary)")
    arguments = parser.parse_args()
    model = load_config(["--config", arguments.recipe]).model
    if arguments.layers:
        model = model.model_copy(update={"num_layers": arguments.layers})
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-") as name:
        folder = Path(name)
        source, run, back = folder / "source", folder / "run", folder / "back"
        count = random_model(model, source)
        print(f"{count / 1e9:.2f}B parameters, bf16; load {' '.join(f'{load:.1f}' for load in psutil.getloadavg())}")
        print("direction     GB in  GB out   time s   GB/s   cp GB/s   ratio   peak memory MB")
        for direction, words, before, after in (
            ("from-hf", ["from-hf", str(source), "--save", str(run)], source, run),
            ("to-hf", ["to-hf", str(run), str(back)], run, back),
        ):
            seconds, peak = converted(words)
            copy_seconds = timed(lambda copied=after: copy(copied, folder / "copy"))
            read, written = size(before), size(after)
            speed, of_copy = (read + written) / seconds, 2 * written / copy_seconds
            print(
                f"{direction:12} {read / 1e9:6.2f} {written / 1e9:7.2f} {seconds:8.1f} {speed / 1e9:6.2f} "
                f"{of_copy / 1e9:9.2f} {speed / of_copy:7.2f} {peak / 1e6:16.0f}",
                flush=True,
            )
        print(f"there and back equal: {same_data(source, back)}")


def random_model(config: ModelConfig, folder: Path) -> int:
    """A model folder of transformers with random weights; the number of its parameters."""
    folder.mkdir()
    architecture = architecture_of(config)
    own = Correspondence.of(config, architecture)
    shapes = {name: own.shape(name) for name in sorted(own.tensors)}
    generator = torch.Generator().manual_seed(0)
    write_tensors(
        folder / "model.safetensors",
        shapes,
        torch.bfloat16,
        lambda name: torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16),
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(write_settings(architecture, config)))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def converted(words: list[str]) -> tuple[float, int]:
    """(seconds, most bytes allocated) of `megalm convert` with these words."""
    process = subprocess.Popen([sys.executable, "-m", "megalm.cli", "convert", *words, "--no-check"])
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, allocated(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = timed(process.wait)
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return seconds, peak


def allocated(pid: int) -> int:
    """Bytes of a process's memory that are no file's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def copy(source: Path, target: Path) -> None:
    """`cp`, until the copy is on disk; then it is removed."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *(str(file) for file in target.rglob("*") if file.is_file())], check=True)
    subprocess.run(["rm", "-r", str(target)], check=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def same_data(first: Path, second: Path) -> bool:
    """Whether both hold the same bytes of tensors."""
    return subprocess.run(["cmp", str(first / "model.safetensors"), str(second / "model.safetensors")]).returncode == 0


if __name__ == "__main__":
    main()
