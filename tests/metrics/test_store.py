"""Where adapters are, what loads took, and jobs: from what engine and store tell."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.census import Census
from adapters_store.histogram import NOTHING, Distribution, Histogram
from server.engine.status import AdapterUse, EngineStats, Figures
from server.metrics import Metrics, store
from tests.metrics.support import Catalogue, samples


def test_tiers_are_the_nearest_place_of_each() -> None:
    metrics, catalogue = Metrics(), Catalogue(Census(disk=frozenset("abcd"), absent=frozenset("ef")))
    metrics.watch_store(catalogue, lambda: EngineStats(adapters_resident=2), lambda: ["a", "b", "e"])
    found = samples(metrics)
    tiers = {tier: found["polyrank_adapters", (("tier", tier),)] for tier in ("device", "host", "disk", "absent")}
    assert tiers == {"device": 2, "host": 1, "disk": 2, "absent": 1}


def test_a_census_is_taken_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, catalogue = Metrics(), Catalogue(Census(disk=frozenset("a")))
    metrics.watch_store(catalogue, EngineStats, list)
    for _ in range(3):
        samples(metrics)
    assert catalogue.taken == 1
    monkeypatch.setattr(store, "CENSUS_SECONDS", -1.0)
    samples(metrics)
    assert catalogue.taken == 2


def test_compression() -> None:
    census = Census(compressed={"int8": 2}, bytes=30, original_bytes=120, errors=(0.1, 0.3))
    metrics = Metrics()
    metrics.watch_store(Catalogue(census), EngineStats, list)
    found = samples(metrics)
    assert found["polyrank_compressed_adapters", (("dtype", "int8"),)] == 2
    assert found["polyrank_compressed_bytes", ()] == 30
    assert found["polyrank_compressed_original_bytes", ()] == 120
    assert found["polyrank_compression_error", ()] == pytest.approx(0.2)
    assert found["polyrank_compression_error_worst", ()] == 0.3


def test_phases_of_loads() -> None:
    read = Histogram((1, 2))
    for value in (0.5, 1.5, 9):
        read.observe(value)
    stats = EngineStats(figures=replace(Figures(), load_seconds=(("read", read.now()),)))
    metrics = Metrics()
    metrics.watch_store(Catalogue(Census(), Distribution((1,), (4, 0), 2.0)), lambda: stats, list)
    found = samples(metrics)
    upto = [found["polyrank_adapter_load_seconds_bucket", (("le", le), ("phase", "read"))] for le in ("1", "2", "+Inf")]
    assert upto == [1, 2, 3]
    assert found["polyrank_adapter_load_seconds_sum", (("phase", "read"),)] == 11
    assert found["polyrank_adapter_load_seconds_count", (("phase", "fetch"),)] == 4


def test_jobs_have_every_state_and_what_is_counted() -> None:
    metrics = Metrics()
    assert samples(metrics)["polyrank_jobs", (("kind", "merge"), ("state", "failed"))] == 0
    metrics.watch_jobs(lambda: {("merge", "failed"): 3})
    found = samples(metrics)
    assert found["polyrank_jobs", (("kind", "merge"), ("state", "failed"))] == 3
    assert found["polyrank_jobs", (("kind", "generate"), ("state", "running"))] == 0


def test_uses_are_counted_under_the_names_that_requests_gave() -> None:
    metrics, uses = Metrics(), [{"d1": AdapterUse(5, 1, 0.5), "d2": AdapterUse(7, 2, 1.0)}, {"d1": AdapterUse(1, 0, 0)}]
    metrics.adapter_used("legal", "d1")
    metrics.watch_uses(lambda: uses.pop(0) if uses else {})
    first, second = samples(metrics), samples(metrics)
    assert first["polyrank_adapter_tokens_total", (("adapter", "legal"),)] == 5
    assert first["polyrank_adapter_wait_seconds_total", (("adapter", "other"),)] == 1
    assert second["polyrank_adapter_tokens_total", (("adapter", "legal"),)] == 6
    assert second["polyrank_adapter_waits_total", (("adapter", "other"),)] == 2


def test_labels_of_adapters_are_bounded_and_leave_no_series_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.metrics.registry.MAX_ADAPTER_LABELS", 2)
    monkeypatch.setattr("server.metrics.labels.WINDOW", 10)
    metrics = Metrics()
    for name in ["a", "b", "c", "d", "e", *["e", "f"] * 20]:
        metrics.adapter_used(name, f"digest-{name}")
    families = text_string_to_metric_families(metrics.render().decode())
    family = next(family for family in families if family.name == "polyrank_adapter_requests")
    found = {sample.labels["adapter"] for sample in family.samples if sample.name.endswith("_total")}
    assert found == {"e", "f", "other"}


def test_an_empty_distribution_is_a_histogram_too() -> None:
    metrics = Metrics()
    metrics.watch_store(Catalogue(Census(), NOTHING), EngineStats, list)
    assert samples(metrics)["polyrank_adapter_load_seconds_count", (("phase", "fetch"),)] == 0
