"""A checkpoint's files are read and hashed once a job, each by one of the ranks that need it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.shards import ShardSpec


def open_together(folder: Path, wanted: Mapping[str, ShardSpec], device: torch.device) -> CheckpointReader:
    """The checkpoint, open on every rank and verified by all together; `wanted` is what this rank is to read of it.

    Raises:
        CheckpointError: a file is missing, has another size or another hash than the manifest says.
    """
    reader = on_all_ranks(device, lambda: CheckpointReader(folder, verify=False), "opening the checkpoint")
    needs = gather_json(sorted(reader.files_of(wanted)), device)
    by = verifiers({name: entry["bytes"] for name, entry in reader.manifest.files.items()}, needs)

    def problems() -> list[str]:
        own = [name for name, rank in by.items() if rank == dist.get_rank()]
        return [problem for name in own for problem in reader.problems(name, verify=True)]

    found = gather_json(on_all_ranks(device, problems, "verifying the checkpoint"), device)
    reader.refuse([problem for of_rank in found for problem in of_rank])
    return reader


def verifiers(sizes: Mapping[str, int], needs: Sequence[Sequence[str]]) -> dict[str, int]:
    """Which rank verifies each file: of those that need it (of all where none does) the one with least to read so far.

    `needs`: the files that each rank needs, by rank.
    """
    load, chosen = Counter[int](), {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        among = [rank for rank, files in enumerate(needs) if name in files] or range(len(needs))
        chosen[name] = min(among, key=lambda rank: (load[rank], rank))
        load[chosen[name]] += sizes[name]
    return chosen
