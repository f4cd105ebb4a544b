"""The engine's figures, under our names and under those that routers and dashboards made for vLLM read."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from adapters_store.histogram import Distribution
from server.engine.status import EngineInfo, EngineStats
from server.metrics import names
from server.metrics.families import several, single, spread
from server.metrics.names import Name

NameOf = Callable[[str], str]


class EngineCollector(Collector):
    """name_of: the name of an adapter by its digest."""

    def __init__(self, info: EngineInfo, stats: Callable[[], EngineStats], name_of: NameOf) -> None:
        self._info = info
        self._stats = stats
        self._name_of = name_of

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is read from the engine before the first scrape

    def collect(self) -> Iterator[Metric]:
        stats, info = self._stats(), self._info
        figures = stats.figures
        for field, name in names.ENGINE_GAUGES.items():
            yield single(name, getattr(stats, field))
        for field, name in names.ENGINE_COUNTERS.items():
            yield single(name, getattr(stats, f"{field}_total"))
        for field, name in names.FIGURES.items():
            yield spread(name, [((), getattr(figures, field))])
        steps = [((kind, "yes" if with_ else "no"), found) for kind, with_, found in figures.step_seconds]
        yield spread(names.STEP_SECONDS, steps)
        compared = [(("with",), figures.compared_seconds), (("without",), figures.compared_base_seconds)]
        yield several(names.COMPARED_SECONDS, compared)
        entropies = {self._name_of(digest): value for digest, value in stats.expert_entropies}
        yield several(names.EXPERT_ENTROPY, [((name,), value) for name, value in entropies.items()])
        yield several(names.ENGINE_INFO, [((info.model_id, info.fingerprint, info.dtype, info.device), 1)])
        yield from self._vllm(stats)

    def _vllm(self, stats: EngineStats) -> Iterator[Metric]:
        model = (self._info.model_id,)
        for field, name in names.VLLM_GAUGES.items():
            yield several(name, [(model, getattr(stats, field))])
        for field, name in names.VLLM_COUNTERS.items():
            yield several(name, [(model, getattr(stats, f"{field}_total"))])
        for field, name in names.VLLM_FIGURES.items():
            yield spread(name, [(model, getattr(stats.figures, field))])
        yield several(names.VLLM_CACHE, [((str(self._info.block_size), str(self._info.kv_blocks)), 1)])
        # One sample only, with the lists as they are now: its value is the time, as the Gateway API reads it.
        lists = (self._list(stats.running_adapters), self._list(stats.waiting_adapters))
        yield several(names.VLLM_LORA, [((str(self._info.max_running), *lists), time.time())])

    def _list(self, digests: Iterable[str]) -> str:
        """Names joined by commas, of which no name has any."""
        return ",".join(sorted({self._name_of(digest) for digest in digests}))


class VllmTimes(Collector):
    """What the API measures by endpoint, again without the endpoint."""

    def __init__(self, model: str, times: Mapping[Name, Histogram], finished: Counter) -> None:
        self._model = model
        self._times = times
        self._finished = finished

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for ours, histogram in self._times.items():
            yield spread(names.VLLM_TIMES[ours], [((self._model,), _over_all(histogram))])
        reasons: dict[str, float] = {}
        for name, labels, value in _samples(self._finished):
            if name.endswith("_total"):
                reasons[labels["reason"]] = reasons.get(labels["reason"], 0.0) + value
        yield several(names.VLLM_SUCCESS, [((self._model, reason), value) for reason, value in reasons.items()])


def _over_all(histogram: Histogram) -> Distribution:
    """The sum over all labels."""
    upto: dict[float, float] = {}
    total = 0.0
    for name, labels, value in _samples(histogram):
        if name.endswith("_bucket"):
            bound = float(labels["le"])
            upto[bound] = upto.get(bound, 0.0) + value
        elif name.endswith("_sum"):
            total += value
    ordered = sorted(upto)
    counts = [int(upto[bound] - (upto[ordered[i - 1]] if i else 0)) for i, bound in enumerate(ordered)]
    return Distribution(tuple(ordered[:-1]), tuple(counts) or (0,), total)


def _samples(metric: Counter | Histogram) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in metric.collect():
        yield from ((sample.name, sample.labels, sample.value) for sample in family.samples)
