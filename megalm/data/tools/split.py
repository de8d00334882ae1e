"""`megalm split`: the documents of an indexed dataset, in order, as several datasets."""

import argparse
import contextlib
import itertools
import math
from collections.abc import Mapping

from megalm.config.paths import path_argument
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.samples.build import open_dataset
from megalm.data.tools.derived import publish_datasets, require_other_prefixes
from megalm.data.tools.verify import require_layout
from megalm.errors import ConfigError, DataError

REST = "rest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm split`."""
    parser.description = "Cut an indexed dataset into consecutive parts; part NAME of P becomes P_NAME."
    parser.add_argument("prefix", type=path_argument, metavar="PREFIX", help="Prefix of PREFIX.bin and PREFIX.idx.")
    parser.add_argument(
        "--output-prefix", type=path_argument, metavar="P", help="Writes P_NAME.bin, .idx, .manifest.json (PREFIX)."
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--shares", nargs="+", metavar="NAME=SHARE", help="Parts by shares of the documents: train=99 valid=1."
    )
    how.add_argument("--documents", nargs="+", metavar="NAME=N", help="Parts by documents: valid=1000 train=rest.")
    parser.add_argument("--overwrite", action="store_true", help="Replace datasets that exist.")


def run(arguments: argparse.Namespace) -> int:
    """Splits and prints what was written.

    Raises:
        ConfigError: parts that do not make sense.
        DataError: a dataset that cannot be read or has too few documents, or an output that cannot be written.
    """
    by_shares = arguments.shares is not None
    parts = parse_parts(arguments.shares if by_shares else arguments.documents, by_shares=by_shares)
    prefix = arguments.prefix
    output = arguments.output_prefix or prefix
    print(split(prefix, output, parts, by_shares=by_shares, overwrite=arguments.overwrite))
    return 0


def parse_parts(words: list[str], *, by_shares: bool) -> dict[str, float]:
    """Name -> share, or number of documents (infinity for "rest"), of words NAME=VALUE.

    Raises:
        ConfigError: every word that is wrong.
    """
    problems, parts = [], dict[str, float]()
    rule = "NAME=SHARE, with a share above 0" if by_shares else 'NAME=N, with N 1 or more, or "rest" for one part'
    for word in words:
        name, _, text = word.partition("=")
        value = _number(text, by_shares=by_shares)
        if not name or "/" in name or value is None:
            problems.append(f"{word} must be {rule}")
        elif name in parts:
            problems.append(f"{word} names {name} twice")
        else:
            parts[name] = value
    if sum(map(math.isinf, parts.values())) > 1:
        problems.append("only one part can take the rest")
    if problems:
        raise ConfigError(problems)
    return parts


def _number(text: str, *, by_shares: bool) -> float | None:
    if text == REST and not by_shares:
        return math.inf
    try:
        value = float(text) if by_shares else int(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def part_ranges(parts: Mapping[str, float], num_documents: int, *, by_shares: bool) -> dict[str, tuple[int, int]]:
    """Name -> documents start .. stop of each part, one after the other.

    Shares are rounded at the boundaries, so that all documents are in one part.

    Raises:
        DataError: a part without documents, or documents that are missing or left over.
    """
    if by_shares:
        total = math.fsum(parts.values())
        ends = [round(num_documents * share / total) for share in itertools.accumulate(parts.values())]
        ends[-1] = num_documents
    else:
        named = sum(int(count) for count in parts.values() if not math.isinf(count))
        left = num_documents - named
        if left < 0 or (left > 0 and math.inf not in parts.values()):
            raise DataError(
                f"the parts take {named} documents, the dataset has {num_documents}; let one take the rest: NAME=rest"
            )
        counts = (left if math.isinf(count) else int(count) for count in parts.values())
        ends = list(itertools.accumulate(counts))
    ranges = dict(zip(parts, itertools.pairwise([0, *ends]), strict=True))
    for name, (start, stop) in ranges.items():
        if start >= stop:
            raise DataError(f"part {name} would have none of the {num_documents} documents; give it more")
    return ranges


def split(
    prefix: str, output_prefix: str, parts: Mapping[str, float], *, by_shares: bool, overwrite: bool = False
) -> str:
    """Writes each part of the dataset `prefix`; nothing is published before all parts are on disk.

    Raises:
        DataError: as `run`.
    """
    outputs = {name: f"{output_prefix}_{name}" for name in parts}
    require_other_prefixes(outputs.values(), [prefix])
    indexed = open_dataset(prefix)
    require_layout(indexed)
    ranges = part_ranges(parts, len(indexed.document_indices) - 1, by_shares=by_shares)
    with contextlib.ExitStack() as stack:
        builders = [
            stack.enter_context(IndexedDatasetBuilder(path, indexed.dtype, overwrite=overwrite))
            for path in outputs.values()
        ]
        for builder, (start, stop) in zip(builders, ranges.values(), strict=True):
            builder.add_part(indexed, start, stop)
        options = [{"made_by": "split", "documents": [start, stop]} for start, stop in ranges.values()]
        return "\n".join(publish_datasets(builders, [indexed], options))
