"""The files for Docker, Prometheus and Grafana: they parse, fit together, and name metrics that exist."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import NoPermissionError

from server.engine.request import FinishReason, StepOutput
from server.engine.status import EngineInfo, EngineStats
from server.metrics import Metrics
from server.replicas.keys import Change, Keys
from server.replicas.link import RedisLink
from server.replicas.state import LinkState
from server.replicas.teller import mend, publish
from server.settings import OTHER_VARIABLES, Settings, is_loopback, variable
from tests.api.fake_replicas import FakeReplicas
from tests.contract.sources import ROOT
from tests.support.redis_server import RedisServer, require_redis

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "overview.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
INFO = EngineInfo("tiny", "f", "llama", "float32", "cpu", "none", 32, 64, 16, 4, 8, 16, 10, 1 << 20, 1 << 20, 1 << 21)
NAME = re.compile(r"\b(?:polyrank|vllm)[_:][a-z_]+")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def compose() -> Any:
    return read("docker-compose.yml")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Samples that a server exports, each with its labels."""
    metrics = Metrics()
    metrics.watch_engine(INFO, EngineStats)
    replicas = FakeReplicas()
    replicas.redis = LinkState(configured=True)
    metrics.watch_replicas(replicas)
    metrics.http_answer("GET", "/health", 200, 0.1)
    metrics.rejected("overloaded")
    metrics.adapter_used("a", "sha256:0")
    timer = metrics.generation("generate", 1)
    timer.output(0, StepOutput(token_id=1))
    timer.output(0, StepOutput(token_id=1, finish_reason=FinishReason.LENGTH))
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query")


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *alert_expressions()])
def test_every_expression_asks_for_what_is_exported(expression: str, exported: dict[str, set[str]]) -> None:
    names = NAME.findall(expression)
    assert names or expression.startswith("up{")
    assert not [name for name in names if name not in exported]
    grouped = re.findall(r"sum by \(([a-z, ]+)\)", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")} - {"instance"}
    assert labels <= set().union(*(exported[name] for name in names))


def test_the_dashboard_is_bound_to_no_one_installation() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert '{instance=~"$instance"}' in target["expr"]


def test_every_measured_time_is_shown(exported: dict[str, set[str]]) -> None:
    shown = set(NAME.findall(" ".join(dashboard_expressions())))
    times = {name for name in exported if name.endswith("_seconds_bucket")} - {"polyrank_http_request_seconds_bucket"}
    assert times <= shown


def test_compose_mounts_files_that_exist_and_opens_loopback_only(compose: Any) -> None:
    assert set(compose["services"]) == {"server", "redis", "prometheus", "grafana"}
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (ROOT / source).is_dir()
        assert all(is_loopback(port.split(":")[0]) for port in service.get("ports", ()))


def test_the_redis_of_compose_starts_and_serves_all_that_is_asked_of_it(compose: Any, tmp_path: Path) -> None:
    """Without scripts, as its command says."""
    require_redis()
    service = compose["services"]["redis"]
    address = urlsplit(compose["services"]["server"]["environment"]["POLYRANK_REDIS"])
    assert address.hostname in compose["services"]
    with RedisServer(tmp_path, options=service["command"][1:]) as redis:
        link = RedisLink(redis.url)
        keys = Keys("test")
        link.call(partial(publish, keys, [Change("public", "a", 1)]))
        link.call(partial(mend, keys, [Change("public", "b", 1)]))
        assert link.call(lambda client: client.xlen(keys.changes)) == 2
        with redis.client() as client, pytest.raises(NoPermissionError):
            client.eval("return 1", 0)
        link.close()


def test_compose_and_dockerfile_set_variables_that_exist(compose: Any) -> None:
    known = {variable(name) for name in Settings.model_fields} | OTHER_VARIABLES
    environment = compose["services"]["server"]["environment"]
    named = set(re.findall(r"POLYRANK_[A-Z_]+", (ROOT / "Dockerfile").read_text())) | set(environment)
    assert named <= known
    assert all(isinstance(value, str) for value in environment.values())
    grace = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_seconds"].default


def test_dockerfile_has_the_targets_and_an_unprivileged_user(compose: Any) -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE)
    assert stages[-2:] == ["cuda", "cpu"]
    assert compose["services"]["server"]["build"]["target"] in stages
    assert "\nUSER polyrank\n" in text
    assert "HEALTHCHECK" in text


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert all(source == "." or source in kept for source in sources)


def test_grafana_finds_its_datasource_and_dashboards(compose: Any) -> None:
    (source,) = read("deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read("deploy/grafana/provisioning/dashboards/polyrank.yaml")["providers"]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


def test_prometheus_scrapes_the_server() -> None:
    settings = read("deploy/prometheus/prometheus.yml")
    (job,) = settings["scrape_configs"]
    assert job["job_name"] == "polyrank"  # PolyrankDown asks for it
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert settings["rule_files"] == [ALERTS.name]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_accepts_its_files() -> None:
    subprocess.run(["promtool", "check", "config", str(ROOT / "deploy/prometheus/prometheus.yml")], check=True)
