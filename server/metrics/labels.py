"""Which adapters have label values of their own: Prometheus keeps a series for each, so only the busiest do."""

from collections import Counter
from collections.abc import Callable

OTHER = "other"
WINDOW = 1000  # uses between two elections
KNOWN = 10  # names remembered for each that has a label


class BusiestLabels:
    """At most `size` names that are label values; all others are `other`. One thread at a time.

    After every `WINDOW` uses those with the most uses of late (a use counts half as much a window later) hold the
    labels. Whoever holds one counts twice, or labels would come and go at the border.
    on_drop: is told of a name that lost its label, whose series must go: it starts anew, from 0, if it comes back.
    """

    def __init__(self, size: int, on_drop: Callable[[str], None]) -> None:
        self._size = size
        self._on_drop = on_drop
        self._holders: set[str] = set()
        self._scores: dict[str, float] = {}
        self._recent: Counter[str] = Counter()
        self._uses = 0

    def use(self, name: str) -> str:
        """Count a use of this name; its label."""
        self._recent[name] += 1
        self._uses += 1
        if self._uses % WINDOW == 0:
            self._elect()
        elif len(self._holders) < self._size:
            self._holders.add(name)
        return self.label(name)

    def label(self, name: str) -> str:
        return name if name in self._holders else OTHER

    def _elect(self) -> None:
        names = self._scores.keys() | self._recent.keys()
        scores = {name: self._scores.get(name, 0.0) / 2 + self._recent[name] for name in names}
        ranked = sorted(scores, key=lambda name: (-scores[name] * (1 + (name in self._holders)), name))
        kept = set(ranked[: self._size])
        for name in self._holders - kept:
            self._on_drop(name)
        self._holders = kept
        self._scores = {name: scores[name] for name in ranked[: KNOWN * self._size]}
        self._recent.clear()
