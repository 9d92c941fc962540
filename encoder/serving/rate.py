"""How fast a stage works, and how long it takes until there is room in it again."""

import math

NEW_WEIGHT = 0.2  # of the latest measurement in the moving average
MIN_S, MAX_S = 1, 600  # of `Retry-After`


class Rate:
    """A moving average, in units per second.

    Args:
        first: assumed until something has been measured.
    Attributes:
        per_s: the average.
    """

    def __init__(self, first: float) -> None:
        self.per_s = first
        self._measured = False

    def measure(self, amount: float, seconds: float) -> None:
        """Take a measurement into the average. The first replaces what was assumed."""
        latest = amount / max(seconds, 1e-6)
        self.per_s += (NEW_WEIGHT if self._measured else 1.0) * (latest - self.per_s)
        self._measured = True

    def retry_after_s(self, amount: float) -> int:
        """Whole seconds in which so much is done."""
        return min(MAX_S, max(MIN_S, math.ceil(amount / self.per_s)))
