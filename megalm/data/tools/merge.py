"""`megalm merge`: indexed datasets end to end as one, byte for byte as Megatron's merge_datasets.py makes it."""

import argparse
from pathlib import Path

from megalm.config.paths import path_argument
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.samples.build import open_dataset
from megalm.data.tools.derived import common_tokenizer, publish_datasets, require_other_prefixes
from megalm.data.tools.verify import require_layout
from megalm.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm merge`."""
    parser.description = "Join indexed datasets of one dtype and tokenizer into one, in the given order."
    parser.add_argument(
        "prefix", nargs="*", type=path_argument, metavar="PREFIX", help="Datasets, or folders for all datasets in them."
    )
    parser.add_argument(
        "--input", nargs="+", default=[], type=path_argument, metavar="PREFIX", help="The same, with Megatron's name."
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        type=path_argument,
        metavar="P",
        help="Writes P.bin, P.idx and P.manifest.json.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a dataset that exists.")


def run(arguments: argparse.Namespace) -> int:
    """Merges and prints what was written.

    Raises:
        ConfigError: no input.
        DataError: datasets that cannot be read or do not fit each other, or an output that cannot be written.
    """
    given = [*arguments.prefix, *arguments.input]
    if not given:
        raise ConfigError("nothing to merge; give the prefixes of datasets: megalm merge A B --output-prefix P")
    prefixes = [prefix for name in given for prefix in prefixes_of(name)]
    print(merge(prefixes, arguments.output_prefix, overwrite=arguments.overwrite))
    return 0


def prefixes_of(name: str) -> list[str]:
    """The datasets in the folder `name` in the order of their names, or `name` itself.

    Raises:
        DataError: a folder without datasets, or with half of one.
    """
    folder = Path(name)
    if not folder.is_dir() or Path(f"{name}.idx").is_file():
        return [name]
    found = {suffix: {path.stem for path in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")}
    if single := sorted(found[".bin"] ^ found[".idx"]):
        raise DataError(f"{folder / single[0]} has only one of .bin and .idx; copy the other, or move it away")
    if not found[".bin"]:
        raise DataError(f"the folder {name} holds no dataset; give prefixes of .bin and .idx files")
    return [str(folder / stem) for stem in sorted(found[".bin"])]


def merge(prefixes: list[str], output_prefix: str, *, overwrite: bool = False) -> str:
    """Writes the datasets of `prefixes` end to end to `output_prefix`; nothing is published when anything goes wrong.

    Raises:
        DataError: as `run`.
    """
    require_other_prefixes([output_prefix], prefixes)
    inputs = [open_dataset(prefix) for prefix in prefixes]
    for indexed in inputs:
        require_layout(indexed)
        if indexed.dtype != inputs[0].dtype:
            raise DataError(
                f"{indexed.prefix} holds {indexed.dtype.name}, {inputs[0].prefix} {inputs[0].dtype.name}; "
                "only datasets of the same dtype can be merged: preprocess one of them again"
            )
    common_tokenizer(inputs)
    with IndexedDatasetBuilder(output_prefix, inputs[0].dtype, overwrite=overwrite) as builder:
        for indexed in inputs:
            builder.add_part(indexed, 0, len(indexed.document_indices) - 1)
        return "\n".join(publish_datasets([builder], inputs, [{"made_by": "merge"}]))
