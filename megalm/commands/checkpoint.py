"""`megalm checkpoint`: what a run folder holds, whether it is whole, and which of it may go."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.checkpoint.catalogue import BEST_BY, Entry, entries_of, looked_at, removable
from megalm.checkpoint.duplicate import copy_checkpoint
from megalm.checkpoint.format import MANIFEST, Manifest, find_checkpoint
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.run_folder import lock_run_folder
from megalm.checkpoint.writer import discard
from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.errors import CheckpointError, ConfigError
from megalm.monitor.tables import age, columns, count, gigabytes, summary

_PLACE = "run folder, or one of its step_N folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, place: str = _PLACE) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        added.add_argument("place", type=path_argument, metavar="RUN", help=place)
        return added

    listed = action("list", "a line for each checkpoint of a run", "run folder")
    verify = action("verify", "read every byte of a checkpoint, or of all of a run, and compare it with the manifest")
    action("inspect", "what a checkpoint holds, who wrote it, and how far the run was")
    prune = action("prune", "remove the checkpoints that no rule wants; the one to go on from stays", "run folder")
    copy = action("copy", "a checkpoint into another run folder, compared after it was written")
    for with_metric in (listed, prune):
        with_metric.add_argument("--metric", default=BEST_BY, metavar="NAME", help="of metrics.jsonl; lower is better")
    verify.add_argument("--sizes", action="store_true", help="the manifest, names and sizes of the files only")
    prune.add_argument("--keep-last", type=Range(1), metavar="N", help="keep so many of the newest")
    prune.add_argument("--keep-every", type=Range(1), metavar="N", help="keep those whose step is a multiple of it")
    prune.add_argument("--keep-best", type=Range(1), metavar="N", help="keep so many with the lowest --metric")
    prune.add_argument("--dry-run", action="store_true", help="say what would go")
    copy.add_argument("target", type=path_argument, metavar="TARGET", help="run folder, made where it is missing")


def run(arguments: argparse.Namespace) -> int:
    """Do the one that is asked for."""
    place = Path(arguments.place)
    match arguments.action:
        case "list":
            print(_list(place, arguments.metric))
        case "verify":
            _verify(place, hashes=not arguments.sizes)
        case "inspect":
            print(_described(_one(place)))
        case "prune":
            rules = Retention(last=arguments.keep_last, every=arguments.keep_every, best=arguments.keep_best)
            _prune(place, rules, arguments.metric, dry_run=arguments.dry_run)
        case "copy":
            source = _one(place)
            print(f"{source} is now {copy_checkpoint(source, Path(arguments.target))}")
    return 0


def _list(run_folder: Path, metric: str) -> str:
    entries, now = _some(run_folder, metric=metric), time.time()
    rows: list[tuple[str, ...]] = [("step", "age", "size", metric, "layout", "")]
    for entry in entries:
        value = "-" if entry.metric is None else f"{entry.metric:.4f}"
        layout = "-" if entry.manifest is None else entry.manifest.layout
        note = "; ".join(entry.problems) if entry.problems else "latest" if entry.is_latest else ""
        rows.append((str(entry.step), age(now - entry.written), gigabytes(entry.bytes), value, layout, note))
    return columns(rows, right=4)


def _verify(place: Path, *, hashes: bool) -> None:
    """Print a line for each that is whole.

    Raises:
        CheckpointError: one is not; all that is wrong, of all.
    """
    if _is_step_folder(place):
        checked = [(place, looked_at(place, hashes=hashes)[1])]
    else:
        checked = [(entry.folder, list(entry.problems)) for entry in _some(place, hashes=hashes)]
    for folder, problems in checked:
        if not problems:
            print(f"{folder} is whole" + ("" if hashes else ", by names and sizes of its files"))
    if wrong := [f"{folder} is damaged: {'; '.join(problems)}" for folder, problems in checked if problems]:
        raise CheckpointError("\n".join(wrong))


def _described(folder: Path) -> str:
    manifest = Manifest.read(folder)
    weights = {name: tensor for name, tensor in manifest.tensors.items() if "weight" in tensor["kinds"]}
    kinds = dict.fromkeys(kind for tensor in manifest.tensors.values() for kind in tensor["kinds"])
    elements = sum(math.prod(tensor["shape"]) for tensor in weights.values())
    progress, model = manifest.states.get("progress", {}), manifest.config.get("model", {})
    rows = [
        ("step", f"{manifest.step}, {progress.get('consumed_samples', 'unknown')} samples"),
        ("written by", f"megalm {manifest.megalm}, format {manifest.format}, {manifest.layout}"),
        ("files", f"{len(manifest.files)}, {gigabytes(sum(entry['bytes'] for entry in manifest.files.values()))}"),
        ("parameters", f"{count(elements)} in {len(weights)} tensors"),
        ("kept of each", ", ".join(kinds)),
        ("states", ", ".join(manifest.states) or "none"),
        *((name.replace("_", " "), str(model[name])) for name in _TOLD if model.get(name) is not None),
        *((name, str(value)) for name, value in manifest.identity.items() if value is not None),
    ]
    return summary(str(folder), rows)


_TOLD = ("model_family", "num_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""What of the model's settings is shown."""


def _prune(run_folder: Path, rules: Retention, metric: str, *, dry_run: bool) -> None:
    if not rules.asks:
        raise ConfigError(["no rule says what stays; give --keep-last N, --keep-every N or --keep-best N"])
    with lock_run_folder(run_folder):
        entries = _some(run_folder, metric=metric)
        if rules.best is not None and all(entry.metric is None for entry in entries):
            raise CheckpointError(
                f"no checkpoint of {run_folder} has a {metric} in metrics.jsonl, so none is the best; give another "
                "--metric, or rules without --keep-best"
            )
        doomed = removable(entries, rules)
        for entry in doomed:
            if not dry_run:
                discard(entry.folder)
    size = gigabytes(sum(entry.bytes for entry in doomed))
    names = ", ".join(entry.folder.name for entry in doomed) or "nothing"
    print(f"{'would remove' if dry_run else 'removed'} {names} ({size}); {len(entries) - len(doomed)} stay")


def _some(run_folder: Path, *, hashes: bool = False, metric: str = BEST_BY) -> Sequence[Entry]:
    """The checkpoints of a run folder.

    Raises:
        CheckpointError: there are none, or it is not a run folder.
    """
    if _is_step_folder(run_folder):
        raise CheckpointError(f"{run_folder} is one checkpoint; give the run folder that it lies in")
    entries = entries_of(run_folder, hashes=hashes, metric=metric)
    if not entries:
        raise CheckpointError(f"{run_folder} holds no checkpoint; give a run folder (--save of the training)")
    return entries


def _one(place: Path) -> Path:
    """The checkpoint that a run folder or a step folder offers.

    Raises:
        CheckpointError: there is none.
    """
    found = find_checkpoint(place, "give one of its step_N folders")
    if found is None:
        raise CheckpointError(f"{place} holds no checkpoint; give a {_PLACE}")
    return found


def _is_step_folder(place: Path) -> bool:
    return (place / MANIFEST).is_file()
