"""Every metric of the service: names, labels and meanings, in this one place.

Label values are bounded: endpoints, routes and codes come from the code, adapter names are counted under their own name
for the first `MAX_ADAPTER_LABELS` seen and under `other` after that, so that counters never go down.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from server.engine.request import StepOutput
from server.engine.status import EngineInfo, EngineStats
from server.replicas.state import LinkState, SharingStats

MAX_ADAPTER_LABELS = 100
MAX_KNOWN_NAMES = 10_000
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

GAUGES = {  # field of EngineStats -> what it says
    "running": "Requests in the batch.",
    "waiting": "Requests in the queue.",
    "kv_usage": "Share of KV blocks held by requests, 0 to 1.",
    "kv_blocks_free": "KV blocks that no request holds.",
    "adapters_resident": "Adapters in device memory.",
    "adapter_bytes_used": "Bytes of device memory held by adapters.",
    "gated_adapters_resident": "Adapters in device memory whose tokens choose their ranks.",
    "kv_blocks_lent": "KV blocks lent to the adapters.",
    "adapters_host": "Adapters in host memory.",
    "host_bytes_used": "Bytes of host memory held by adapters.",
    "seconds_since_step": "Seconds since the engine's last step; 0 while idle.",
    "compiling": "1 while the model's layers are compiled in the background.",
    "layers_compiled": "1 from when the model's layers run compiled.",
}
COUNTERS = {
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache.",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache.",
    "prompt_tokens": "Prompt tokens taken in.",
    "generated_tokens": "Tokens generated.",
    "steps": "Steps of the engine.",
    "preemptions": "Requests put back into the queue for want of KV blocks.",
    "adapter_hits": "Requests that found their adapter in device memory.",
    "adapter_misses": "Requests that had to wait for their adapter.",
    "adapter_loads": "Adapters loaded into device memory.",
    "adapter_evictions": "Adapters evicted from device memory.",
    "adapter_load_failures": "Adapters that could not be loaded.",
    "host_hits": "Loads that found their adapter in host memory.",
    "host_misses": "Loads that had to read their adapter from disk or store.",
    "host_evictions": "Adapters evicted from host memory.",
}


class Sharing(Protocol):
    """Where the figures of the servers over one store are read."""

    def count(self) -> int: ...
    def link(self) -> LinkState: ...
    def stats(self) -> SharingStats: ...


class Metrics:
    """One registry of metrics. The API records requests; the engine's figures are read when scraped."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._names: OrderedDict[str, str] = OrderedDict()
        self._labels: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"polyrank_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"polyrank_{name}_seconds", text, [label], buckets=buckets, registry=self.registry)

        self._http = counter("http_requests", "HTTP answers.", "method", "route", "status")
        self._rejections = counter("rejections", "Refused requests by error code.", "code")
        self._requests = counter("generation_requests", "Requests given to the engine.", "endpoint")
        self._finished = counter("generations_finished", "Answers by finish reason.", "endpoint", "reason")
        self._adapters = counter("adapter_requests", "Calls by adapter; beyond the first 100 `other`.", "adapter")
        self._http_seconds = histogram("http_request", "Time to the end of the answer.", "route", REQUEST_BUCKETS)
        self._first = histogram("time_to_first_token", "From submit to first token.", "endpoint", FIRST_TOKEN_BUCKETS)
        self._inter = histogram("inter_token", "Between tokens of one answer.", "endpoint", INTER_TOKEN_BUCKETS)
        self._whole = histogram("generation", "From submit to the last token.", "endpoint", REQUEST_BUCKETS)

    def watch_engine(self, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        """Export the engine's own figures too. Once per Metrics."""
        self.registry.register(_EngineCollector(info, stats, self.name_of))

    def watch_replicas(self, replicas: "Sharing") -> None:
        """Export the link to Redis and what is shared with other servers. Once per Metrics."""
        self.registry.register(_SharingCollector(replicas))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def http_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH") else "other"
        self._http.labels(known, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def rejected(self, code: str) -> None:
        self._rejections.labels(code).inc()

    def adapter_used(self, name: str, digest: str) -> None:
        """Count a call to an adapter, and remember the name for metrics of the engine, which knows digests only."""
        self._names[digest] = name
        self._names.move_to_end(digest)
        if len(self._names) > MAX_KNOWN_NAMES:
            self._names.popitem(last=False)
        if name not in self._labels and len(self._labels) < MAX_ADAPTER_LABELS:
            self._labels.add(name)
        self._adapters.labels(name if name in self._labels else "other").inc()

    def name_of(self, digest: str) -> str:
        return self._names.get(digest, digest[:12])

    def generation(self, endpoint: str, count: int) -> "GenerationTimer":
        self._requests.labels(endpoint).inc(count)
        return GenerationTimer(self, endpoint, count)

    def first_token(self, endpoint: str, seconds: float) -> None:
        self._first.labels(endpoint).observe(seconds)

    def next_token(self, endpoint: str, seconds: float) -> None:
        self._inter.labels(endpoint).observe(seconds)

    def finished(self, endpoint: str, reason: str, seconds: float) -> None:
        self._finished.labels(endpoint, reason).inc()
        self._whole.labels(endpoint).observe(seconds)


class GenerationTimer:
    """Times the tokens of the answers of one call."""

    def __init__(self, metrics: Metrics, endpoint: str, count: int) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._started = time.perf_counter()
        self._last: list[float | None] = [None] * count
        self._open = set(range(count))

    def output(self, index: int, output: StepOutput) -> None:
        now = time.perf_counter()
        if output.token_id is not None:
            last = self._last[index]
            if last is None:
                self._metrics.first_token(self._endpoint, now - self._started)
            else:
                self._metrics.next_token(self._endpoint, now - last)
            self._last[index] = now
        if output.finish_reason is not None:
            self._finish(index, output.finish_reason.value, now)

    def done(self) -> None:
        """Whatever has not finished by now was aborted."""
        for index in list(self._open):
            self._finish(index, "abort", time.perf_counter())

    def _finish(self, index: int, reason: str, now: float) -> None:
        if index in self._open:
            self._open.discard(index)
            self._metrics.finished(self._endpoint, reason, now - self._started)


class _SharingCollector(Collector):
    """What servers over one store share. The figures of Redis only where it is configured, for an alert to rely on."""

    def __init__(self, replicas: Sharing) -> None:
        self._replicas = replicas

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        link, stats = self._replicas.link(), self._replicas.stats()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield counter("polyrank_store_checks", "Names compared with the store before their use.", value=stats.checks)
        text = "Names that the store did not answer for in time."
        yield counter("polyrank_store_check_failures", text, value=stats.failed_checks)
        if not link.configured:
            return
        yield gauge("polyrank_redis_up", "1 while Redis answers.", value=link.up)
        yield counter("polyrank_redis_calls", "Calls to Redis.", value=link.calls)
        yield counter("polyrank_redis_failures", "Calls to Redis without a right answer.", value=link.failures)
        text = "Times that Redis was left alone for a second after a failure."
        yield counter("polyrank_redis_breaker_openings", text, value=link.openings)
        yield gauge("polyrank_replicas", "Servers alive, this one included.", value=self._replicas.count())
        yield counter("polyrank_replica_changes", "Changes by other servers, heard through Redis.", value=stats.changes)
        yield gauge("polyrank_replica_lag_seconds", "Age of the last notice when it was read.", value=stats.lag)
        yield gauge("polyrank_replica_notices_waiting", "Own changes not told yet.", value=stats.waiting)


class _EngineCollector(Collector):
    """The engine's figures, under our names and under those that routers made for vLLM read."""

    def __init__(self, info: EngineInfo, stats: Callable[[], EngineStats], name_of: Callable[[str], str]) -> None:
        self._info = info
        self._stats = stats
        self._name_of = name_of

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is read from the engine before the first scrape

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, text in GAUGES.items():
            yield GaugeMetricFamily(f"polyrank_{field}", text, value=getattr(stats, field))
        for field, text in COUNTERS.items():
            yield CounterMetricFamily(f"polyrank_{field}", text, value=getattr(stats, f"{field}_total"))
        seconds = CounterMetricFamily(
            "polyrank_adapter_load_seconds", "Time spent on bringing adapters to device memory.", labels=["phase"]
        )
        for phase, value in stats.adapter_load_seconds_total:
            seconds.add_metric([phase], value)
        yield seconds
        text = "How evenly the gated adapters used last use their ranks: 1 for all alike. The mean of their modules."
        entropy = GaugeMetricFamily("polyrank_expert_load_entropy", text, labels=["adapter"])
        for name, value in {self._name_of(digest): value for digest, value in stats.expert_entropies}.items():
            entropy.add_metric([name], value)
        yield entropy
        info = self._info
        facts = {"model": info.model_id, "fingerprint": info.fingerprint, "dtype": info.dtype, "device": info.device}
        yield InfoMetricFamily("polyrank_engine", "The base model and how it runs.", value=facts)
        yield from self._vllm(stats)

    def _vllm(self, stats: EngineStats) -> Iterator[Metric]:
        values = {
            "num_requests_running": (stats.running, "Requests in the batch."),
            "num_requests_waiting": (stats.waiting, "Requests in the queue."),
            "kv_cache_usage_perc": (stats.kv_usage, "Share of KV blocks in use, 0 to 1."),
        }
        for name, (value, text) in values.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._info.model_id], value)
            yield family
        blocks = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=["block_size", "num_gpu_blocks"])
        blocks.add_metric([str(self._info.block_size), str(self._info.kv_blocks)], 1)
        yield blocks
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        # One sample only, with the lists as they are now: its value is the time, as the Gateway API reads it.
        lora = GaugeMetricFamily("vllm:lora_requests_info", "Adapters running and waiting now.", labels=labels)
        lora.add_metric(
            [str(self._info.max_running), self._list(stats.running_adapters), self._list(stats.waiting_adapters)],
            time.time(),
        )
        yield lora

    def _list(self, digests: Iterable[str]) -> str:
        return ",".join(sorted({self._name_of(digest) for digest in digests}))
