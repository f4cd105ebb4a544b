"""The files for Docker, Prometheus and Grafana: they parse, fit together, and name metrics that exist."""

import json
import re
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

from deploy import readme
from deploy.grafana import dashboards
from server.replicas.keys import Change, Keys
from server.replicas.link import RedisLink
from server.replicas.teller import mend, publish
from server.settings import OTHER_VARIABLES, Settings, is_loopback, variable
from tests.contract.sources import ROOT
from tests.metrics.support import everything
from tests.support.prometheus_server import require_prometheus
from tests.support.redis_server import RedisServer, require_redis

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
RULES = [ROOT / "deploy" / "prometheus" / name for name in ("recording.yml", "alerts.yml")]
NAME = re.compile(r"\b(?:polyrank|vllm)[_:][a-z0-9_:]+")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def compose() -> Any:
    return read("docker-compose.yml")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Samples that a server exports, each with its labels."""
    families = text_string_to_metric_families(everything().render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def dashboard_expressions() -> Iterator[str]:
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel["targets"])
        yield from (item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query")


def rules() -> Iterator[Any]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *(rule["expr"] for rule in rules())])
def test_every_expression_asks_for_what_is_exported(expression: str, exported: dict[str, set[str]]) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    names = [name for name in NAME.findall(expression) if name not in recorded]
    assert names or expression.startswith("up{") or any(name in expression for name in recorded)
    assert not [name for name in names if name not in exported]
    grouped = re.findall(r" by \(([a-z, ]+)\)", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")} - {"instance"}
    assert labels <= set().union(*(exported[name] for name in names))


def test_the_dashboards_keep_their_addresses() -> None:
    uids = {path.stem: json.loads(path.read_text())["uid"] for path in DASHBOARDS}
    assert uids == {"overview": "polyrank-overview", "adapters": "polyrank-adapters", "store": "polyrank-store"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_bound_to_no_one_installation(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            selectors = re.findall(r"(?:polyrank|vllm)[_:][a-z_]+(\{[^}]*\})?", target["expr"])
            assert selectors
            assert all('instance=~"$instance"' in selector for selector in selectors)


def test_every_measured_time_is_shown(exported: dict[str, set[str]]) -> None:
    shown = set(NAME.findall(" ".join(dashboard_expressions())))
    times = {name.removesuffix("_bucket") for name in exported if re.match(r"polyrank.*_seconds_bucket$", name)}
    assert times <= {re.sub("_(bucket|sum|count)$", "", name) for name in shown}


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
    assert settings["rule_files"] == [path.name for path in RULES]


def test_what_is_generated_is_current() -> None:
    for name, dashboard in dashboards.DASHBOARDS.items():
        assert (dashboards.FOLDER / name).read_text() == dashboards.text(dashboard), "run `make fmt`"
    assert readme.current(readme.README.read_text()) == readme.README.read_text(), "run `make fmt`"


def test_alerts_say_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    titles = {panel["title"] for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]}
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "runbook"}
        options = re.findall(r"`(--[a-z-]+)", rule["annotations"]["runbook"])
        assert {option[2:].replace("-", "_") for option in options} <= set(Settings.model_fields)
        assert set(re.findall(r"`([A-Z][A-Za-z ,]+)`", rule["annotations"]["runbook"])) <= titles
        named = set(re.findall(r"Polyrank[A-Z]\w+", rule["annotations"]["runbook"]))
        assert named <= {rule["alert"] for rule in alerts}


def test_every_alert_fires_in_its_test() -> None:
    tests = read("deploy/prometheus/alerts_test.yml")["tests"]
    assert [test["name"] for test in tests] == [rule["alert"] for rule in rules() if "alert" in rule]
    for test in tests:
        quiet, firing = test["promql_expr_test"]
        assert quiet["exp_samples"] == []
        assert [s["labels"] for s in firing["exp_samples"]] == [f'{{alertname="{test["name"]}", instance="a"}}']


def test_prometheus_accepts_its_files_and_alerts_fire() -> None:
    require_prometheus()
    folder = ROOT / "deploy" / "prometheus"
    subprocess.run(["promtool", "check", "config", str(folder / "prometheus.yml")], check=True)
    subprocess.run(["promtool", "test", "rules", str(folder / "alerts_test.yml")], check=True)


def test_an_alert_that_never_fires_is_found(tmp_path: Path) -> None:
    require_prometheus()
    for path in (ROOT / "deploy" / "prometheus").glob("*.yml"):
        (tmp_path / path.name).write_text(path.read_text().replace("polyrank_seconds_since_step > 30", "vector(0) > 1"))
    checked = subprocess.run(["promtool", "test", "rules", str(tmp_path / "alerts_test.yml")], capture_output=True)
    assert checked.returncode != 0
    assert b"PolyrankStuck" in checked.stderr + checked.stdout
