"""Blends: equal to megatron-core's arrays, and made of what the paths say."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.data import BlendSpec, DataConfig
from megalm.data.samples.blend import Blend, BlendSizes, normalize
from megalm.data.samples.build import build_datasets, short_names
from megalm.data.tokenizers import greedy
from megalm.errors import DataError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20) | st.integers(1, 40).map(lambda n: [1.0] * n)


def arrays(size: int) -> tuple[Any, Any]:
    return np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)


@QUICK
@given(weights, st.integers(0, 500))
def test_weighted_blends_equal_megatrons(megatron: Any, given_weights: list[float], size: int) -> None:
    shares = normalize(given_weights)
    assert shares == megatron.utils.normalize(given_weights)
    datasets, numbers = arrays(size)
    megatron.helpers.build_blending_indices(datasets, numbers, normalize(shares), len(shares), size, False)
    blend = Blend.weighted(shares, size)
    np.testing.assert_array_equal(blend.dataset_index, datasets)
    np.testing.assert_array_equal(blend.dataset_sample_index(), numbers)
    assert blend.dataset_index.dtype == datasets.dtype


@QUICK
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_exhaustive_blends_equal_megatrons(megatron: Any, sizes: list[int]) -> None:
    datasets, numbers = arrays(sum(sizes))
    megatron.helpers.build_exhaustive_blending_indices(datasets, numbers, sizes, len(sizes))
    blend = Blend.exhaustive(sizes)
    np.testing.assert_array_equal(blend.dataset_index, datasets)
    np.testing.assert_array_equal(blend.dataset_sample_index(), numbers)


@settings(QUICK, max_examples=25)
@given(
    st.lists(st.floats(1e-5, 1), min_size=2, max_size=8) | st.lists(st.integers(1, 9), min_size=2, max_size=30),
    st.integers(1, 20_000),
    st.sampled_from(
        [{}, {"WARMUP": 1, "STRETCH": 2}, {"_ATTEMPTS": 1, "_PATIENCE": 100}, {"WARMUP": 1, "_MIN_WIDTH": 2}]
    ),
)
def test_blends_of_many_stretches_equal_megatrons(
    megatron: Any, given_weights: list[float], size: int, changed: dict[str, int]
) -> None:
    """However badly the stretches are guessed, and whether or not they can be mended."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(greedy, name, value)
        shares = normalize(given_weights)
        datasets, numbers = arrays(size)
        again = normalize(shares)  # its BlendedDataset does it a second time
        megatron.helpers.build_blending_indices(datasets, numbers, again, len(shares), size, False)
        np.testing.assert_array_equal(Blend.weighted(shares, size).dataset_index, datasets)
        sizes = [max(1, int(share * size)) for share in shares]
        datasets, numbers = arrays(sum(sizes))
        megatron.helpers.build_exhaustive_blending_indices(datasets, numbers, sizes, len(sizes))
        np.testing.assert_array_equal(Blend.exhaustive(sizes).dataset_index, datasets)


def test_empty_datasets_take_no_part_in_an_exhaustive_blend() -> None:
    assert Blend.exhaustive([0, 2, 0, 4]).dataset_index.tolist() == [3, 1, 3, 1, 3, 3]
    assert Blend.exhaustive([0, 3]).dataset_index.tolist() == [1, 1, 1]
    assert len(Blend.exhaustive([0, 0])) == 0


def test_three_hundred_equal_weights_are_taken_in_turn(megatron: Any) -> None:
    datasets, numbers = arrays(1000)
    shares = normalize([1.0] * 300)
    megatron.helpers.build_blending_indices(datasets, numbers, shares, 300, 1000, False)
    np.testing.assert_array_equal(Blend.weighted(shares, 1000).dataset_index, datasets)


def test_steps_are_located_and_counted_across_blocks() -> None:
    blend = Blend.weighted(normalize([3.0, 1.0, 2.0]), 3 * Blend.BLOCK + 17)
    numbers = blend.dataset_sample_index()
    for step in (0, 1, Blend.BLOCK - 1, Blend.BLOCK, 2 * Blend.BLOCK + 5, len(blend) - 1):
        assert blend.locate(step) == (blend.dataset_index[step], numbers[step])
        assert blend.counts(step) == np.bincount(blend.dataset_index[:step], minlength=3).tolist()
    assert sum(blend.counts(len(blend))) == len(blend)


@QUICK
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.integers(1, 10**7))
def test_sizes_equal_megatrons_builder(megatron: Any, given_weights: list[float], size: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset as peer

    shares = normalize(given_weights)
    sizes = BlendSizes.of(shares, size)
    assert [[n] for n in sizes.targets] == peer(shares, [size])
    assert [[n] for n in sizes.requests] == peer(shares, [size], surplus=0.005)


@pytest.mark.parametrize(
    ("words", "prefixes", "given_weights"),
    [
        (["a"], ["a"], None),
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["a", "b"], ["a", "b"], None),
        (["0.3", "a", ".7", "b"], ["a", "b"], (0.3, 0.7)),
        (["30", "a", "1e2", "b"], ["a", "b"], (30.0, 100.0)),
        (["2", "a"], ["a"], (2.0,)),
    ],
)
def test_paths_are_read_by_megatrons_rule(words: list[str], prefixes: list[str], given_weights: Any) -> None:
    assert BlendSpec.parse(words) == BlendSpec(tuple(prefixes), given_weights)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("0 a 1 b", "the weight 0 of a must be positive"),
        ("-1 a 1 b", "the weight -1 of a must be positive"),
        ("nan a 1 b", "the weight nan of a must be positive"),
        ("inf a 1 b", "the weight inf of a must be positive"),
        ("0.5 a b c", '"b" stands where the weight of c is expected'),
        ("0.5 a 0.5", "prefixes, or weights and prefixes in turn"),
        ("a 0.7 b 0.3", "a weight stands before its prefix: 0.7 a 0.3 b"),
    ],
)
@pytest.mark.parametrize("name", ["data_path", "train_data_path"])
def test_bad_weights_are_named(words: str, problem: str, name: str) -> None:
    problems = DataConfig(**{name: words.split()}).problems()
    assert len(problems) == 1
    assert problem in problems[0]
    assert problems[0].startswith(name)


def test_a_recipe_may_write_one_prefix_or_a_list_with_numbers() -> None:
    assert DataConfig(data_path="one prefix").data_path == ("one prefix",)
    assert DataConfig(data_path=[0.5, "a", 1, "b"]).blend("data_path") == BlendSpec(("a", "b"), (0.5, 1.0))


def build(data: DataConfig, **changes: Any) -> Any:
    options: dict[str, Any] = {"seq_length": 8, "num_samples": (60, 12, 0), "seed": 1, "vocab_size": 1000}
    return build_datasets(data, **options | changes)


@pytest.fixture
def prefixes(make_dataset: Any) -> list[str]:
    """Three datasets of different sizes."""
    return [make_dataset([17, 40, 3, 60, 25, 31] * n, f"set_{n}").prefix for n in (1, 2, 3)]


def peer_blend(megatron: Any, words: list[str], sizes: Any, **options: Any) -> Any:
    """megatron-core's datasets for the same words."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.utils import get_blend_from_list
    from test_gpt_index import MegatronTokenizer

    config = megatron.gpt_dataset.GPTDatasetConfig(
        blend=get_blend_from_list(words), tokenizer=MegatronTokenizer(), random_seed=1,
        sequence_length=8, reset_position_ids=False, reset_attention_mask=False, create_attention_mask=False,
        eod_mask_loss=False, num_dataset_builder_threads=1, **options,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(megatron.gpt_dataset.GPTDataset, sizes, lambda: True, config).build()


@pytest.mark.parametrize("form", ["W P W P W P", "P P P", "W P", "P"])
def test_the_training_and_validation_samples_are_megatrons(megatron: Any, prefixes: list[str], form: str) -> None:
    words = {
        "W P W P W P": ["0.5", prefixes[0], "0.2", prefixes[1], "0.3", prefixes[2]],
        "P P P": prefixes, "W P": ["3", prefixes[1]], "P": prefixes[:1],
    }[form]  # fmt: skip
    theirs = peer_blend(megatron, words, [60, 12, 0], split="70,30,0")
    ours = build(DataConfig(data_path=words, split="70,30,0"))
    for mine, his in ((ours.train, theirs[0]), (ours.valid[""], theirs[1])):
        assert len(mine) == len(his)
        for number in range(len(his)):
            np.testing.assert_array_equal(mine[number].tokens[1:], his[number]["labels"].numpy())
            if form != "P":
                assert mine[number].dataset == his[number]["dataset_id"]


def test_whole_validation_sets_without_weights_are_exhausted(prefixes: list[str]) -> None:
    data = DataConfig(train_data_path=prefixes[0], valid_data_path=prefixes)
    valid = build(data, num_samples=(5, None, 0)).valid[""]
    assert Counter(valid[k].dataset for k in range(len(valid))) == {
        dataset: (176 * (dataset + 1) - 1) // 8 for dataset in range(3)
    }


def test_validation_sets_of_their_own_have_their_names(prefixes: list[str]) -> None:
    data = DataConfig(train_data_path=prefixes[0], valid_data_path=prefixes, multiple_validation_sets=True)
    valid = build(data).valid
    assert list(valid) == ["set_1", "set_2", "set_3"]
    assert all(len(dataset) >= 12 for dataset in valid.values())


def test_names_are_as_short_as_they_differ() -> None:
    assert short_names(["/a/wiki", "/a/code"]) == ("wiki", "code")
    assert short_names(["/a/en/text", "/a/de/text", "/b/x"]) == ("en/text", "de/text", "x")
    assert short_names(["/a/x", "/a/x"]) == ("/a/x 1", "/a/x 2")


def test_more_than_one_epoch_needs_weights(prefixes: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"train split of 3 datasets without weights has 129 samples .*\(21, 43, 65\), but 500"
    ):
        build(DataConfig(data_path=prefixes, split="1"), num_samples=(500, 0, 0))
    words = ["1", prefixes[0], "1", prefixes[1]]
    assert len(build(DataConfig(data_path=words, split="1"), num_samples=(500, 0, 0)).train) >= 500


def test_one_missing_dataset_of_a_blend_is_named(prefixes: list[str]) -> None:
    with pytest.raises(DataError, match=r"set_4\.bin"):
        build(DataConfig(data_path=["1", prefixes[0], "1", prefixes[0][:-1] + "4"]))


def test_a_dataset_too_small_for_a_sample_is_named(prefixes: list[str], make_dataset: Any) -> None:
    small = make_dataset([3], "small").prefix
    with pytest.raises(DataError, match=r"train split of .*small: 1 documents with 3 tokens"):
        build(DataConfig(train_data_path=["1", prefixes[0], "1", small]))


def test_a_blend_in_quotes_or_with_commas_says_how_it_is_written(tmp_path: Path, write_dataset: Any) -> None:
    assert DataConfig(data_path=("0.7 a 0.3 b",)).problems() == [
        'data_path: "0.7 a 0.3 b" is one word; leave out the quotes, so that it is 4'
    ]
    assert DataConfig(data_path=("my data",)).problems() == []
    names = [str(write_dataset(tmp_path / name, [30] * 40)) for name in "ab"]
    with pytest.raises(DataError, match=f"separate prefixes by blanks: {' '.join(names)}"):
        build(DataConfig(data_path=(",".join(names),)))
