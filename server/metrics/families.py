"""Samples of a metric, made when Prometheus asks."""

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from adapters_store.histogram import Distribution
from server.metrics.names import Name

Labels = tuple[str, ...]


def single(name: Name, value: float) -> Metric:
    """A gauge or counter without labels."""
    return several(name, [((), value)])


def several(name: Name, values: Iterable[tuple[Labels, float]]) -> Metric:
    """A gauge or counter; values: of its labels, in their order, and the value."""
    family: GaugeMetricFamily | CounterMetricFamily
    if name.kind == "gauge":
        family = GaugeMetricFamily(name.name, name.text, labels=name.labels)
    else:
        family = CounterMetricFamily(name.name, name.text, labels=name.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def spread(name: Name, found: Iterable[tuple[Labels, Distribution]]) -> Metric:
    """A histogram; found: of its labels, in their order, and what was measured."""
    family = HistogramMetricFamily(name.name, name.text, labels=name.labels)
    for labels, each in found:
        bounds = [*(f"{bound:g}" for bound in each.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(each.counts), strict=True)), each.sum)
    return family
