"""A loaded server under a real Prometheus: every panel shows something, every rule can be evaluated."""

import json
import math
import re
from collections.abc import Iterator

import pytest

from server.metrics import store
from tests.contract.sources import ROOT
from tests.deploy.traffic import Traffic, compress, watched
from tests.support.prometheus_server import PrometheusServer, require_prometheus
from tests.support.redis_server import require_redis

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
PATIENCE = 240  # seconds; a loaded two-core machine
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of every query, as Grafana would send it."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                assert "$" not in expression
                yield f"{dashboard['title']} / {panel['title']} / {target['legendFormat']}", expression


def test_every_panel_shows_something_and_every_rule_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_prometheus()
    require_redis()
    with watched(tmp_path_factory.mktemp("watched")) as (server, prometheus):
        compress(server.url, ["adapter-1", "adapter-2"])
        with Traffic(server.url) as traffic:
            empty = dict(panels())
            assert len(empty) == len(list(panels())), "two queries of one name"

            def filled() -> bool:
                for name, expression in list(empty.items()):
                    if any(not math.isnan(float(sample["value"][1])) for sample in prometheus.query(expression)):
                        del empty[name]
                return traffic.check() and not empty

            try:
                prometheus.until(filled, PATIENCE, "every panel shows something")
            except AssertionError as error:
                raise AssertionError(f"panels without data: {sorted(empty)}") from error
            prometheus.until(lambda: _all_evaluated(prometheus), PATIENCE, "every rule is evaluated")
            _check_values(prometheus)


def _all_evaluated(prometheus: PrometheusServer) -> bool:
    rules = prometheus.rules()
    assert len(rules) == 21
    assert not [rule["lastError"] for rule in rules if rule.get("lastError")]
    return all(rule["health"] == "ok" for rule in rules)


def _check_values(prometheus: PrometheusServer) -> None:
    """Figures that hang together, of one moment."""

    def value(expression: str) -> float:
        [sample] = prometheus.query(expression)
        return float(sample["value"][1])

    assert value("sum(polyrank_adapters)") >= 12
    assert value('polyrank_adapters{tier="absent"}') == 0, "the store is a folder"
    assert 0 < value("polyrank_compressed_bytes / polyrank_compressed_original_bytes") < 1
    assert 0 < value("polyrank_compression_error_worst") < 0.05
    assert value("sum(vllm:num_requests_running) - sum(polyrank_running)") == 0
    for ours, theirs in (("time_to_first_token", "time_to_first_token"), ("generation", "e2e_request_latency")):
        difference = f"sum(polyrank_{ours}_seconds_count) - sum(vllm:{theirs}_seconds_count)"
        assert abs(value(difference)) <= 8, "but for requests that end during the scrape"
    [lists] = prometheus.query("vllm:lora_requests_info")
    named = re.findall(r"[^,]+", lists["metric"].get("running_lora_adapters", ""))
    assert all(name.startswith("adapter-") for name in named)
    codes = {sample["metric"]["code"] for sample in prometheus.query("polyrank_rejections_total")}
    assert {"model_not_found", "invalid_parameter"} <= codes
    assert store.CENSUS_SECONDS < PATIENCE, "or the compressed adapters would not be seen"
