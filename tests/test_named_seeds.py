"""Named seeds: fixed for ever, since runs and the order of their samples follow from them."""

from megalm.randomness import purpose_number, stable_seed, stable_seed_32, stable_words


def test_the_numbers_of_a_name_are_always_the_same() -> None:
    assert stable_seed(1, "dropout", 0) == 274977729917915880
    assert stable_seed_32(1, "layout", 1) == 100798089
    assert stable_words(2, "stream", 3, 0) == [16207649802062594527, 1974275301356963217]
    assert stable_words(8, "stream", 3, 0)[:2] == [16207649802062594527, 1974275301356963217]
    assert purpose_number("mock-ring") == int.from_bytes(b"mock-ring", "little")


def test_each_part_of_a_name_counts() -> None:
    names = [(1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a")]
    assert len({stable_seed(*name) for name in names}) == len(names)
    assert all(0 <= stable_seed(*name) < 2**63 and 0 <= stable_seed_32(*name) < 2**32 for name in names)
