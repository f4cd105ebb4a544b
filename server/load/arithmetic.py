"""Percentiles, and draws with a skew."""

import bisect
import itertools
import random
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Zipf:
    """Draws 0 to count - 1; number k comes 1 / (k + 1) as often as number 0."""

    def __init__(self, count: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._bounds = list(itertools.accumulate(1 / (rank + 1) for rank in range(count)))

    def draw(self) -> int:
        return bisect.bisect(self._bounds, self._random.random() * self._bounds[-1])
