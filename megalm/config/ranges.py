"""Numbers that users give: finite, in a range, and what to say about those that are not."""

import argparse
import math
from dataclasses import dataclass

LARGEST = 2**31 - 1
"""The largest whole number of a setting or a flag that does not say more: counts and sizes are far from it."""
LARGEST_SEED = 2**32 - 1
"""numpy's generators take no larger ones."""


@dataclass(frozen=True)
class Range:
    """A flag's type for argparse: the numbers from `least` to `most`, whole where `whole` is set."""

    least: float
    most: float = LARGEST
    whole: bool = True

    def __call__(self, text: str) -> int | float:
        """The number that a word of the command line is.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of the range.
        """
        kind = "a whole number" if self.whole else "a number"
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:  # also of more than 4300 digits
            value = math.nan
        if not self.least <= value <= self.most:  # nan is not
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise argparse.ArgumentTypeError(f"must be {kind} from {self.least:.10g} to {self.most:.10g}, not {shown}")
        return value
