"""`polyrank doctor`: each finding, and how the whole ends."""

import json
import socket
from pathlib import Path

import pytest

from server.commands import checks
from server.commands.checks import Check, State
from server.settings import load
from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> None:
    monkeypatch.setenv("POLYRANK_STORE", str(tmp_path / "not" / "there" / "yet"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_all_is_well(polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYRANK_PORT", str(free_port()))
    monkeypatch.setenv("POLYRANK_KV_CACHE_MEMORY", "1MiB")
    result = polyrank("doctor", "--json")
    assert result.code == 0
    findings = {item["name"]: item for item in json.loads(result.out)}
    machine = ["python", "packages", "torch", "compiler", "caches", "cores"]
    names = [*machine, "gpu", "memory", "model", "store", "clock", "redis", "port", "server"]
    assert list(findings) == names
    varies = ("packages", "compiler", "cores", "memory")  # between machines and moments
    assert {findings[name]["state"] for name in names if name not in varies} == {"ok"}
    assert findings["server"]["found"] == f"{fake.url} serves tiny"
    assert list(tmp_path.iterdir()) == []
    words = polyrank("doctor").out
    assert all(name in words for name in names)


def test_a_bad_setting_is_named_and_fails(polyrank: Polyrank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_KV_CACHE_MEMORY", "much")
    result = polyrank("doctor", "--url", "http://127.0.0.1:9")
    assert result.code == 1
    assert "FAIL  settings" in result.out
    assert "POLYRANK_KV_CACHE_MEMORY=much" in result.out
    assert "warn  server" in result.out


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = load({"port": str(other.getsockname()[1])})
        # Whoever holds it answers nothing: give up soon.
        monkeypatch.setattr("server.client.Client.ready", lambda client: False)
        assert checks.port(settings).state is State.FAILED


def test_a_port_held_by_a_server_of_ours(fake: FakeServer) -> None:
    finding = checks.port(load({"port": fake.url.rpartition(":")[2]}))
    assert finding.state is State.OK
    assert "running server" in finding.found


@pytest.mark.parametrize(
    ("model", "state"), [("smollm2", State.OK), ("no/such-model", State.WARNING), ("not a model", State.FAILED)]
)
def test_models(model: str, state: State) -> None:
    assert checks.model(load({"model": model})).state is state


def test_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = checks.store(load({"store": str(tmp_path / "file" / "store")}))
    assert finding.state is State.FAILED
    assert "POLYRANK_STORE" in finding.mend


def test_store_in_memory() -> None:
    assert checks.store(load({"store": "memory://"})).state is State.OK


def test_memory_that_is_not_there() -> None:
    finding = checks.memory(load({"kv_cache_memory": "900TiB"}))
    assert finding.state is State.WARNING
    assert "--kv-cache-memory" in finding.mend


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert checks.compiler() == Check(
        "compiler",
        State.WARNING,
        "no-such-compiler is not there",
        "apt-get install g++, or set CXX (without one adapters run in plain torch, many times slower)",
    )


def test_another_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda name: "1.0")
    finding = checks.torch()
    assert finding.state is State.WARNING
    assert "not the tested torch and transformers" in finding.found
