"""What the store holds and where, what loading from it takes, and the jobs that write to it."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from adapters_store.census import Census
from adapters_store.histogram import Distribution
from server.engine.status import EngineStats
from server.metrics import names
from server.metrics.families import several, single, spread
from server.replicas.state import LinkState, SharingStats

CENSUS_SECONDS = 30.0  # a census looks at each adapter's files: about 10 us for one

JobCounts = Callable[[], Mapping[tuple[str, str], int]]  # kind and state -> how many


class Catalogue(Protocol):
    """The names of the store; `census` touches the local disk."""

    def census(self) -> Census: ...
    def fetch_seconds(self) -> Distribution: ...


class StoreCollector(Collector):
    """held: digests in host and device memory. The census is as old as `CENSUS_SECONDS`, tiers are those of now."""

    def __init__(
        self, catalogue: Catalogue, stats: Callable[[], EngineStats], held: Callable[[], Collection[str]]
    ) -> None:
        self._catalogue = catalogue
        self._stats = stats
        self._held = held
        self._census = Census()
        self._taken = float("-inf")
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        census, stats, held = self._current(), self._stats(), frozenset(self._held())
        device = stats.adapters_resident
        tiers = {"device": device, "host": max(0, len(held) - device)}
        tiers |= {"disk": len(census.disk - held), "absent": len(census.absent - held)}
        yield several(names.TIERS, [((tier,), count) for tier, count in tiers.items()])
        yield several(names.KINDS, [((kind,), count) for kind, count in census.kinds.items()])
        yield several(names.COMPRESSED, [((dtype,), count) for dtype, count in census.compressed.items()])
        yield single(names.COMPRESSED_BYTES, census.bytes)
        yield single(names.ORIGINAL_BYTES, census.original_bytes)
        yield single(names.COMPRESSION_ERROR, sum(census.errors) / max(1, len(census.errors)))
        yield single(names.WORST_COMPRESSION_ERROR, max(census.errors, default=0.0))
        loads = [("fetch", self._catalogue.fetch_seconds()), *stats.figures.load_seconds]
        yield spread(names.LOAD_SECONDS, [((phase,), found) for phase, found in loads])

    def _current(self) -> Census:
        with self._lock:
            if time.monotonic() - self._taken > CENSUS_SECONDS:
                self._census, self._taken = self._catalogue.census(), time.monotonic()
            return self._census


class JobsCollector(Collector):
    """Jobs by kind and state, every one of them named even when there is none."""

    def __init__(self) -> None:
        self.counts: JobCounts = dict

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        none = {(kind, state): 0 for kind in names.JOB_KINDS for state in names.JOB_STATES}
        yield several(names.JOBS, (none | dict(self.counts())).items())


class Sharing(Protocol):
    """Where the figures of the servers over one store are read."""

    def count(self) -> int: ...
    def link(self) -> LinkState: ...
    def stats(self) -> SharingStats: ...


class SharingCollector(Collector):
    """What servers over one store share. The figures of Redis only where it is configured, for an alert to rely on."""

    def __init__(self, replicas: Sharing) -> None:
        self._replicas = replicas

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        link, stats = self._replicas.link(), self._replicas.stats()
        yield single(names.STORE_CHECKS, stats.checks)
        yield single(names.STORE_CHECK_FAILURES, stats.failed_checks)
        if not link.configured:
            return
        yield single(names.REDIS_UP, link.up)
        yield single(names.REDIS_CALLS, link.calls)
        yield single(names.REDIS_FAILURES, link.failures)
        yield single(names.BREAKER_OPENINGS, link.openings)
        yield single(names.REPLICAS, self._replicas.count())
        yield single(names.REPLICA_CHANGES, stats.changes)
        yield single(names.REPLICA_LAG, stats.lag)
        yield single(names.NOTICES_WAITING, stats.waiting)
