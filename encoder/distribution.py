"""How often values of each size have occurred: what a histogram is made of."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate


class Distribution:
    """Counts values by size. One thread observes; any may read.

    Args:
        bounds: of the buckets: the largest value in each, in ascending order. One more bucket has all above.
    Attributes:
        total: the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Each bound, infinity last, and how many values were no larger."""
        return zip((*self.bounds, float("inf")), accumulate(self.counts.copy()), strict=True)
