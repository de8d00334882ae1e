"""`megalm report`: what a finished or stopped run has reached, and how to look at it and go on."""

import argparse
from pathlib import Path
from typing import Any

from megalm.checkpoint.reader import CheckpointReader
from megalm.commands.generate import load_model, open_checkpoint, sample_text, tokenizer_of
from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.errors import CheckpointError, MegalmError
from megalm.monitor.sinks.jsonl import read_metrics
from megalm.monitor.tables import summary
from megalm.storage.faults import reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm report`."""
    parser.add_argument("--load", required=True, type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument("--prompt", default="def main(", help="text that the sample continues")
    parser.add_argument(
        "--max-new-tokens", type=Range(1), metavar="N", help="length of the sample (default 128, or what fits)"
    )
    parser.add_argument("--command", dest="launch", metavar="TEXT", help="the command that trains the run, to be shown")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    folder = Path(arguments.load)
    reader = open_checkpoint(arguments.load)
    metrics = folder / "metrics.jsonl"
    with reading(metrics, CheckpointError, "give this process the right to read it"):
        if not metrics.is_file():
            raise CheckpointError(f"{folder} has no metrics.jsonl; give the run folder (--save of the training)")
        rows = read_metrics(metrics)
    lines = [("training loss", _span(rows, "loss")), ("validation loss", _span(rows, "validation_loss"))]
    perplexities = _points(rows, "validation_ppl")
    if perplexities:
        lines.append(("validation perplexity", f"{perplexities[-1][1]:.1f}"))
    lines += [("checkpoint", str(reader.folder)), ("curves", f"tensorboard --logdir {folder / 'tensorboard'}")]
    if arguments.launch:
        lines.append(("continue", arguments.launch))
    print(summary(f"report of {folder}", lines))
    print("\n" + _sample(reader, folder, arguments))
    return 0


def _sample(reader: CheckpointReader, folder: Path, arguments: argparse.Namespace) -> str:
    """A text of the model, or why there is none: the report is good without one."""
    options = {"max_new_tokens": arguments.max_new_tokens, "temperature": 0.7, "top_p": 0.9, "seed": 1234}
    try:
        tokenizer = tokenizer_of(reader)
        text = sample_text(load_model(reader), tokenizer, arguments.prompt, num_samples=1, **options)[0]
    except MegalmError as error:
        return f"no sample: {error}"
    title = f"sample (megalm generate --load {folder} --prompt {arguments.prompt!r}):"
    return "\n".join([title, "", *("    " + line for line in text.splitlines())])


def _span(rows: list[dict[str, Any]], name: str) -> str:
    """First and last value of one metric with their steps."""
    points = _points(rows, name)
    if not points:
        return "none logged"
    (first, start), (last, end) = points[0], points[-1]
    return f"{start:.3f} (step {first}) -> {end:.3f} (step {last})" if last != first else f"{end:.3f} (step {last})"


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric; where it was not finite there is none."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
