"""Looks at how gated adapters in device memory use their ranks. No tensors."""

import math
import time
from typing import Protocol

from server.engine.adapter_pool import AdapterPool
from server.engine.status import ExpertLoad, Residency

MOST = 10  # adapters whose use of ranks the metrics tell
EVERY = 10.0  # seconds between two looks at their counters


class _Storage(Protocol):
    def gated(self, slot: int) -> bool: ...
    def experts(self, slot: int) -> dict[str, ExpertLoad]: ...
    def entropy(self, slot: int) -> float | None: ...


class ExpertWatch:
    """Reads the counters of resident adapters. For the engine's thread only."""

    def __init__(self, storage: _Storage, adapters: AdapterPool, hidden: str) -> None:
        """hidden: how digests of adapters begin that nobody shall hear of."""
        self._storage = storage
        self._adapters = adapters
        self._hidden = hidden
        self._looked = -math.inf
        self.resident = 0  # gated adapters in device memory, at the last look
        self.entropies: tuple[tuple[str, float], ...] = ()  # of those used last, by digest

    def read(self, digest: str) -> dict[str, ExpertLoad]:
        """By module; empty for an adapter without gates, or not in device memory."""
        if self._adapters.residency(digest) is not Residency.RESIDENT:
            return {}
        return self._storage.experts(self._adapters.slot(digest))

    def look(self, *, now: bool) -> None:
        """Renew what the metrics tell; not `now`: if it is old."""
        if not now and time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        gated = [
            digest
            for digest in self._adapters.resident()
            if not digest.startswith(self._hidden) and self._storage.gated(self._adapters.slot(digest))
        ]
        found = {digest: self._storage.entropy(self._adapters.slot(digest)) for digest in gated[-MOST:]}
        self.resident = len(gated)
        self.entropies = tuple((digest, entropy) for digest, entropy in found.items() if entropy is not None)
