"""The arithmetic of the bench."""

import statistics
from collections.abc import Sequence

from server.load.arithmetic import percentile


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
