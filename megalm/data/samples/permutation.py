"""A keyed permutation of 0 .. n - 1 that is computed, not stored: a generalized Feistel network with cycle walking.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 4: numbers are pairs (left, right)
with left < a and right < b for a x b >= n, a about b; each round adds a keyed function of one half to the other, modulo
its size, which can be undone whatever the function is. A result of n or more is sent through again until it is below n.
"""

import math

from megalm.randomness import stable_words

_ROUNDS = 8
_MASK = 2**64 - 1


class KeyedPermutation:
    """`permutation[k]` is the k-th of the numbers 0 .. size - 1 in an order that `key` decides."""

    def __init__(self, size: int, *key: int | str) -> None:
        assert size > 0, "a permutation has at least one number"
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = stable_words(_ROUNDS, *key)

    def __len__(self) -> int:
        """How many numbers there are."""
        return self.size

    def __getitem__(self, number: int) -> int:
        """Where `number` goes.

        Raises:
            IndexError: it is not one of the numbers.
        """
        if not 0 <= number < self.size:
            raise IndexError(f"{number} of {self.size} numbers")
        number = self._once(number)
        while number >= self.size:  # a x b < size + a: once in a great while
            number = self._once(number)
        return number

    def _once(self, number: int) -> int:
        a, b = self._a, self._b
        left, right = divmod(number, b)
        for round_number, key in enumerate(self._keys):
            if round_number % 2:
                right = (right + _mix(left ^ key)) % b
            else:
                left = (left + _mix(right ^ key)) % a
        return left * b + right


def _mix(value: int) -> int:
    """A 64-bit number from a 64-bit number: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
