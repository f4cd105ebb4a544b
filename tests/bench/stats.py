"""The arithmetic of the bench."""

import bisect
import itertools
import random
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(ours: Sequence[float], theirs: Sequence[float], *, lower: bool = False) -> dict[str, float]:
    """How many times `theirs` ours is: by the medians of the runs, and by the best of each (`lower`: the lowest)."""
    best = min if lower else max
    return {
        "median": round(statistics.median(ours) / statistics.median(theirs), 3),
        "best": round(best(ours) / best(theirs), 3),
    }


def milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, under the names of a row; nothing if nothing was timed."""
    if not seconds:
        return {}
    return {
        f"{name}_median_ms": round(statistics.median(seconds) * 1e3, 1),
        f"{name}_p99_ms": round(percentile(seconds, 0.99) * 1e3, 1),
    }


class Zipf:
    """Draws 0 to count - 1; number k comes 1 / (k + 1) as often as number 0."""

    def __init__(self, count: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._bounds = list(itertools.accumulate(1 / (rank + 1) for rank in range(count)))

    def draw(self) -> int:
        return bisect.bisect(self._bounds, self._random.random() * self._bounds[-1])
