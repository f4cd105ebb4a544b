"""Adapters that gave no valid numbers several times are refused for a while, so that they cost no further steps."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from server.engine.request import TRIAL, WeightedAdapter

FAILURES = 3  # requests without valid numbers before an adapter is refused
SECONDS = 600.0  # how long a failure counts; then the adapter may try again


class Quarantine:
    """Failures per adapter. Only a request that uses one adapter as it is proves anything about that adapter.

    In a composition nobody knows whose fault it was, and a tenant could name somebody else's adapter beside a bad one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, list[float]] = defaultdict(list)

    def blame(self, adapters: tuple[WeightedAdapter, ...]) -> None:
        """A request with these adapters had no valid numbers. One on trial will not come again under its digest."""
        if len(adapters) == 1 and adapters[0].weight == 1 and not adapters[0].digest.startswith(TRIAL):
            self._failures[adapters[0].digest].append(self._clock())

    def refused(self, digests: Iterable[str]) -> str | None:
        """The first of these adapters that is in quarantine."""
        return next((digest for digest in digests if self._holds(digest)), None)

    def _holds(self, digest: str) -> bool:
        if digest not in self._failures:
            return False
        since = self._clock() - SECONDS
        recent = [moment for moment in self._failures[digest] if moment > since]
        self._failures[digest] = recent
        if not recent:
            del self._failures[digest]
        return len(recent) >= FAILURES
