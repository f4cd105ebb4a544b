"""The registry of metrics of one server. The API records requests; the other figures are read when scraped.

Label values are bounded: endpoints, routes and codes come from the code; of the adapters only the busiest have their
own (`BusiestLabels`).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.access.key import KeyState
from server.engine.status import AdapterUse, EngineInfo, EngineStats
from server.metrics import names
from server.metrics.access import AccessCollector
from server.metrics.engine import EngineCollector, VllmTimes
from server.metrics.labels import BusiestLabels
from server.metrics.names import Name
from server.metrics.store import Catalogue, JobCounts, JobsCollector, Sharing, SharingCollector, StoreCollector
from server.metrics.timer import GenerationTimer, Times

MAX_ADAPTER_LABELS = 100
MAX_KNOWN_NAMES = 10_000
METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Metrics:
    """One registry; each `watch_` is called at most once."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._digests: OrderedDict[str, str] = OrderedDict()  # digest -> name that was called last
        self._lock = threading.Lock()
        counter, histogram = self._counter, self._histogram
        self._http, self._rejections = counter(names.HTTP_REQUESTS), counter(names.REJECTIONS)
        self._requests, self._finished = counter(names.REQUESTS), counter(names.FINISHED)
        self._http_seconds = histogram(names.HTTP_SECONDS, names.REQUEST_BUCKETS)
        self._first = histogram(names.FIRST_TOKEN, names.FIRST_TOKEN_BUCKETS)
        self._inter = histogram(names.INTER_TOKEN, names.INTER_TOKEN_BUCKETS)
        self._whole = histogram(names.WHOLE, names.REQUEST_BUCKETS)
        self._lag = histogram(names.LOOP_LAG, names.LAG_BUCKETS)
        self._adapters = [counter(name) for name in names.PER_ADAPTER]
        self._labels = BusiestLabels(MAX_ADAPTER_LABELS, self._drop)
        self._take_uses: Callable[[], Mapping[str, AdapterUse]] = dict
        self._jobs = JobsCollector()
        self.registry.register(self._jobs)

    def watch_engine(self, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        """Export the engine's own figures too."""
        times = {names.FIRST_TOKEN: self._first, names.INTER_TOKEN: self._inter, names.WHOLE: self._whole}
        self.registry.register(EngineCollector(info, stats, self.name_of))
        self.registry.register(VllmTimes(info.model_id, times, self._finished))

    def watch_uses(self, take: Callable[[], Mapping[str, AdapterUse]]) -> None:
        """Export what each adapter is used for. take: by digest, since it was called last."""
        self._take_uses = take

    def watch_store(
        self, catalogue: Catalogue, stats: Callable[[], EngineStats], held: Callable[[], Collection[str]]
    ) -> None:
        """Export what the store holds. held: digests in host and device memory."""
        self.registry.register(StoreCollector(catalogue, stats, held))

    def watch_replicas(self, replicas: Sharing) -> None:
        """Export the link to Redis and what is shared with other servers."""
        self.registry.register(SharingCollector(replicas))

    def watch_access(
        self, keys: Callable[[], KeyState] | None, audit_failures: Callable[[], int] | None = None
    ) -> None:
        """Export the state of the API keys, and the failures of the record of changes."""
        self.registry.register(AccessCollector(keys, audit_failures))

    def watch_jobs(self, counts: JobCounts) -> None:
        """Export how many jobs there are. counts: by kind and state, of `JOB_KINDS` and `JOB_STATES`."""
        self._jobs.counts = counts

    def render(self) -> bytes:
        """The text for Prometheus. Looks at the store's files now and then: not for the event loop."""
        self._count_uses()
        return generate_latest(self.registry)

    def http_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        self._http.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def rejected(self, code: str) -> None:
        self._rejections.labels(code).inc()

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def adapter_used(self, name: str, digest: str) -> None:
        """Count a request of an adapter, and remember its name for the engine's figures: that knows digests only."""
        with self._lock:
            self._digests[digest] = name
            self._digests.move_to_end(digest)
            if len(self._digests) > MAX_KNOWN_NAMES:
                self._digests.popitem(last=False)
            self._adapters[0].labels(self._labels.use(name)).inc()

    def name_of(self, digest: str) -> str:
        """digest: or the key of a variant, which has the name of its adapter."""
        return self._digests.get(digest.partition(":")[0], digest[:12])

    def generation(self, endpoint: str, count: int) -> GenerationTimer:
        """Count requests to the engine; the timer takes what becomes of them."""
        self._requests.labels(endpoint).inc(count)
        times = Times(
            self._first.labels(endpoint).observe,
            self._inter.labels(endpoint).observe,
            partial(self._ended, endpoint),
        )
        return GenerationTimer(times, count)

    def _ended(self, endpoint: str, reason: str, seconds: float) -> None:
        self._finished.labels(endpoint, reason).inc()
        self._whole.labels(endpoint).observe(seconds)

    def _count_uses(self) -> None:
        with self._lock:
            for digest, use in self._take_uses().items():
                label = self._labels.label(self.name_of(digest))
                for counter, value in zip(self._adapters[1:], (use.tokens, use.waits, use.wait_seconds), strict=True):
                    counter.labels(label).inc(value)

    def _drop(self, adapter: str) -> None:
        for counter in self._adapters:
            counter.remove(adapter)

    def _counter(self, name: Name) -> Counter:
        return Counter(name.name, name.text, name.labels, registry=self.registry)

    def _histogram(self, name: Name, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name.name, name.text, name.labels, buckets=buckets, registry=self.registry)
