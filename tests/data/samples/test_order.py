"""The order of samples over stops and changes: nothing twice, nothing left out."""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.sample import Sample
from megalm.data.samples.source import Padded, Sampling, Source
from megalm.errors import CheckpointError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEQ = 4


@pytest.fixture
def sources(make_dataset: Any) -> Any:
    """Sources whose tokens are all different, so that a sample is known by its first one."""

    def make(order: str = "shuffle", seed: int = 5) -> list[Source]:
        sampling = Sampling(seq_length=SEQ, seed=seed, order=order)
        found = []
        for name, lengths in (("a", [13, 9, 20, 5]), ("b", [30, 0, 41, 8]), ("c", [7, 70])):
            if name not in opened:
                opened[name] = make_dataset(lengths, name, vocab_size=60000)
            found.append(Source(opened[name], range(len(lengths)), sampling))
        return found

    opened: dict[str, Any] = {}
    return make


def through_json(record: OrderRecord) -> OrderRecord:
    return OrderRecord.from_json(json.loads(json.dumps(asdict(record))))


def drawn(dataset: Any, start: int, stop: int) -> list[tuple[int, int]]:
    """(dataset, first token) of the samples start .. stop."""
    samples = [dataset[number] for number in range(start, stop)]
    assert [sample.number for sample in samples] == list(range(start, stop))
    return [(sample.dataset, int(sample.tokens[0])) for sample in samples]


@pytest.mark.parametrize("order", ["shuffle", "stream"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(sources: Any, order: str, weights: Any) -> None:
    size = 40
    whole = BlendedDataset(sources(order), weights, size)
    for stop in (1, 17, 39):
        record = through_json(whole.record(stop))
        again = BlendedDataset(sources(order), weights, size, record=record)
        assert again.start == 0
        assert drawn(again, stop, size) == drawn(whole, stop, size)
        assert again.record(size) == whole.record(size)


@pytest.mark.parametrize("order", ["shuffle", "stream"])
def test_a_longer_run_keeps_the_order_and_finishes_the_epochs_it_has_begun(sources: Any, order: str) -> None:
    (source, *_) = sources(order)
    first = BlendedDataset([source], None, 15)  # 47 tokens: 11 samples an epoch, two epochs
    begun = drawn(first, 0, 12)
    later = BlendedDataset([source], None, 60, record=through_json(first.record(12)))
    rest = drawn(later, 12, 60)
    assert rest[:3] == drawn(first, 12, 15)
    if order == "shuffle":
        laid_out = len(first)
        starts = sorted((0, int(first[number].tokens[0])) for number in range(laid_out))
        assert sorted(begun + rest[: laid_out - 12]) == starts, "each sample of the first layout once"
    else:
        assert Counter(Counter(begun + rest[:10]).values()) == {2: 11}, "each sample once an epoch"


def test_a_shorter_run_keeps_the_order(sources: Any) -> None:
    (source, *_) = sources()
    first = BlendedDataset([source], None, 60)
    later = BlendedDataset([source], None, 20, record=through_json(first.record(12)))
    assert drawn(later, 12, 20) == drawn(first, 12, 20)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3),
            st.integers(1, 25),
            st.integers(0, 15),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["shuffle", "stream"]),
)
def test_each_dataset_goes_on_where_it_was_whatever_changes(sources: Any, phases: Any, order: str) -> None:
    """Phases of (weights, samples drawn, samples planned beyond): lengths and weights change at each start."""
    record, position = None, 0
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    used = sources(order)
    for weights, taken, beyond in phases:
        dataset = BlendedDataset(used, weights, position + taken + beyond, record=record)
        for number, first_token in drawn(dataset, position, position + taken):
            seen[number].append(first_token)
        position += taken
        record = through_json(dataset.record(position))
        assert [d.consumed for d in record.datasets] == [len(seen[k]) for k in range(3)]
    for number, source in enumerate(used):
        # 11, 19 and 19 samples an epoch; a layout holds whole epochs
        layout = source.lay_out(record.datasets[number].requests, len(seen[number]))
        assert seen[number] == [int(layout[k].tokens[0]) for k in range(len(seen[number]))]
        per_epoch = source.num_samples(None)
        if len(seen[number]) <= per_epoch and order == "stream":
            assert len(set(seen[number])) == len(seen[number])


def test_one_epoch_of_each_is_drawn_once_over_a_change_of_weights(sources: Any) -> None:
    used = sources()
    first = BlendedDataset(used, [3.0, 1.0, 1.0], 10)
    record = through_json(first.record(10))
    left = BlendedDataset(used, None, None, record=record)
    both = drawn(first, 0, 10) + drawn(left, 10, len(left))
    assert len(set(both)) == len(both), "nothing twice"
    counts = Counter(number for number, _ in both)
    assert counts == {k: used[k].num_samples(first.record(0).datasets[k].requests[0]) for k in range(3)}
    again = BlendedDataset(used, None, None, record=through_json(left.record(20)))
    assert drawn(again, 20, len(again)) == drawn(left, 20, len(left))


def test_another_dataset_is_refused_unless_allowed(sources: Any, make_dataset: Any) -> None:
    a, b, c = sources()
    record = BlendedDataset([a, b], [1.0, 1.0], 20).record(10)
    with pytest.raises(CheckpointError, match=r"/c is not a dataset that the run began with.*5 samples used\) is gone"):
        BlendedDataset([a, c], [1.0, 1.0], 20, record=record)
    changed = BlendedDataset([a, c], [1.0, 1.0], 20, record=record, allow_changed=True)
    assert [(d.base, d.consumed) for d in changed.record(10).datasets] == [(5, 5), (0, 0)]
    assert drawn(changed, 10, 20)
    alone = BlendedDataset([a], None, 20, record=record, allow_changed=True)
    assert int(alone[10].tokens[0]) == int(a.lay_out([11], 6)[5].tokens[0])


def test_edited_data_is_another_dataset(make_dataset: Any) -> None:
    indexed = make_dataset([30, 30])
    before = Source(indexed, range(2), Sampling(seq_length=SEQ, seed=1)).key
    with open(f"{indexed.prefix}.bin", "r+b") as stream:
        stream.write(b"\x07\x07")
    again = type(indexed)(indexed.prefix)
    assert Source(again, range(2), Sampling(seq_length=SEQ, seed=1)).key != before
    assert Source(again, range(1), Sampling(seq_length=SEQ, seed=1)).key != before


def test_the_same_data_twice_has_two_counters(sources: Any) -> None:
    a, *_ = sources()
    dataset = BlendedDataset([a, a], [3.0, 1.0], 12)
    record = through_json(dataset.record(12))
    assert [d.consumed for d in record.datasets] == [9, 3]
    assert len({d.data for d in record.datasets}) == 2
    assert BlendedDataset([a, a], [3.0, 1.0], 14, record=record).start == 0


def test_padding_fills_a_batch_without_tokens() -> None:
    class Three:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> Any:
            return Sample(number, 0, np.asarray([number, number], dtype=np.int64))

    padded = Padded(Three(), 4)
    assert [padded[k].tokens.tolist() for k in range(len(padded))] == [[0, 0], [1, 1], [2, 2], [-1, -1]]
    assert len(Padded(Three(), 3)) == 3
