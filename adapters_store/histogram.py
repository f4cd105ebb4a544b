"""Counts of measured values by size, in the form that Prometheus takes: cheap enough for every step of an engine."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram at one moment. counts: of values up to each bound, and one more for those above all; sum: of all."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


NOTHING = Distribution()


@dataclass(slots=True)
class Histogram:
    """One thread writes, or several under a lock of theirs; any thread may read."""

    bounds: Sequence[float]
    sum: float = 0.0
    _counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def now(self) -> Distribution:
        return Distribution(tuple(self.bounds), tuple(self._counts), self.sum)
