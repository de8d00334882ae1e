"""Each file of a checkpoint is read and hashed once a job, by a rank that needs it; damage is every rank's error."""

from pathlib import Path

import handmade
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megalm.checkpoint import reader
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.verify import open_together, verifiers
from megalm.distributed.shards import ShardSpec
from megalm.errors import CheckpointError
from megalm.testing.spawner import run_on_ranks

FILES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 1000), min_size=1, max_size=12)


@given(sizes=FILES, ranks=st.integers(1, 6), data=st.data())
def test_each_file_has_one_rank_and_it_is_one_that_needs_it(
    sizes: dict[str, int], ranks: int, data: st.DataObject
) -> None:
    needs = [data.draw(st.sets(st.sampled_from(sorted(sizes)))) for _ in range(ranks)]
    chosen = verifiers(sizes, [sorted(files) for files in needs])
    assert set(chosen) == set(sizes)
    for name, rank in chosen.items():
        assert 0 <= rank < ranks
        assert name in needs[rank] or not any(name in files for files in needs)


def test_the_work_is_spread_where_all_ranks_need_all_files() -> None:
    sizes = {f"rank_{number}": 10 for number in range(8)}
    chosen = list(verifiers(sizes, [sorted(sizes)] * 4).values())
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


def opened(run: str, damage: bool) -> tuple[list[str], str]:
    """The files that this rank hashed, and its error."""
    folder = handmade.save(Path(run), 2)
    if damage and dist.get_rank() == 0:
        path = folder / "rank_00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    dist.barrier()
    hashed: list[str] = []
    original = reader.sha256_of
    reader.sha256_of = lambda path: hashed.append(Path(path).name) or original(path)  # type: ignore[assignment]
    wanted = {name: ShardSpec.of_whole(tuple(tensor.shape)) for name, tensor in handmade.TENSORS.items()}
    try:
        found = open_together(folder, wanted, handmade.CPU)
    except CheckpointError as error:
        return hashed, str(error)
    assert isinstance(found, CheckpointReader)
    return hashed, ""


def test_a_job_hashes_each_file_once(tmp_path: Path) -> None:
    seen = run_on_ranks(3, opened, str(tmp_path), False, timeout_s=60)
    assert sorted(name for hashed, _ in seen for name in hashed) == [
        f"rank_0000{rank}.safetensors" for rank in range(3)
    ]
    assert all(len(hashed) == 1 and not error for hashed, error in seen)


def test_damage_that_one_rank_finds_is_every_ranks_error(tmp_path: Path) -> None:
    seen = run_on_ranks(2, opened, str(tmp_path), True, timeout_s=60)
    assert {error.partition(" is damaged: ")[2].partition(";")[0] for _, error in seen} == {
        "rank_00001.safetensors has another SHA-256 than was written"
    }
