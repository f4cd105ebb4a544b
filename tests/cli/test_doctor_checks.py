"""Each check of `polyrank doctor` where what it looks for is wrong."""

import http.server
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.responses import JSONResponse

from server.client import Client
from server.commands import checks, machine_checks, place_checks
from server.commands.checks import State
from server.settings import load
from tests.cli.fake_server import FakeServer, error
from tests.support.redis_server import RedisServer, require_redis
from tests.support.server_process import free_port


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.python().state is State.OK
    monkeypatch.setattr(machine_checks, "OLDEST", (sys.version_info[0], sys.version_info[1] + 1))
    assert machine_checks.python().state is State.FAILED


def test_packages_that_are_missing_or_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "requires", lambda name: ["a==1", "b==2", "c==3; extra == 'dev'"])
    monkeypatch.setattr(machine_checks, "version", {"a": "1", "b": "2"}.__getitem__)
    assert machine_checks.packages().state is State.OK
    monkeypatch.setattr(machine_checks, "version", {"a": "1", "b": "9"}.__getitem__)
    finding = machine_checks.packages()
    assert (finding.state, "b 9 instead of ==2" in finding.found) == (State.WARNING, True)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine_checks, "version", missing)
    finding = machine_checks.packages()
    assert (finding.state, finding.found) == (State.FAILED, "not installed: a, b")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "not" / "yet"))
    finding = machine_checks.caches()
    assert (finding.state, "builds the kernels" in finding.found) == (State.OK, True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "TemporaryFile", _refuse)
    finding = machine_checks.caches()
    assert (finding.state, "POLYRANK_CACHE" in finding.mend) == (State.FAILED, True)


def _refuse(**_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("quota", "threads", "load", "said"),
    [
        (None, "", 0.5, ""),
        (None, "8", 0.5, "more threads than cores"),
        ("200000 100000", "", 0.5, "more threads than cores"),
        (None, "1", 0.5, "left idle"),
        (None, "", 9.0, "keep them busy"),
        ("max 100000", "", 0.5, ""),
        ("150000 100000", "1", 0.5, ""),
    ],
)
def test_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, threads: str, load: float, said: str
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine_checks, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    finding = machine_checks.cores()
    assert finding.state is (State.WARNING if said else State.OK)
    assert said in finding.found


def test_a_gpu_that_is_asked_for_or_lacks_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine_checks.gpu(load({"device": "cuda"})).state is State.FAILED
    assert machine_checks.gpu(load()).state is State.OK
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert machine_checks.gpu(load()).state is State.WARNING
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert machine_checks.gpu(load()).state is State.OK
    monkeypatch.setattr(machine_checks, "find_spec", lambda name: None)
    assert machine_checks.gpu(load()).state is State.FAILED


def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(str(100 << 20))
    (tmp_path / "memory.current").write_text(str(60 << 20))
    finding = checks.memory(load())
    assert (finding.state, finding.found.split(",")[0]) == (State.WARNING, "40.0 MiB free")


def test_models_whose_head_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    finding = checks.model(load({"model": str(tmp_path / "x.gguf")}))
    assert (finding.state, "no GGUF file" in finding.found) == (State.FAILED, True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "of-another-age"}')
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    assert checks.model(load({"model": str(tmp_path / "folder")})).state is State.FAILED


@pytest.mark.parametrize(("skew", "state"), [(0.0, State.OK), (60.0, State.WARNING), (-3600.0, State.FAILED)])
def test_the_clock_of_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, skew: float, state: State) -> None:
    now = time.time
    monkeypatch.setattr(place_checks, "time", SimpleNamespace(time=lambda: now() + skew))
    assert place_checks.clock(load({"store": str(tmp_path / "store")})).state is state
    assert place_checks.clock(load({"store": "memory://"})).state is State.OK


@pytest.fixture
def late() -> Iterator[str]:
    """An S3 whose time is an hour behind."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - 3600, usegmt=True)

        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_clock_of_a_bucket(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", late)
    finding = place_checks.clock(load({"store": "s3://bucket/prefix"}))
    assert (finding.state, "signed requests" in finding.found) == (State.FAILED, True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert place_checks.clock(load({"store": "s3://bucket/prefix"})).state is State.OK, "the check of the store tells"


def test_redis_that_is_not_there() -> None:
    assert place_checks.redis(load()).state is State.OK
    finding = place_checks.redis(load({"redis": f"redis://:secret@127.0.0.1:{free_port()}"}))
    assert (finding.state, "does not answer" in finding.found) == (State.FAILED, True)
    assert "secret" not in finding.found + finding.mend


def test_redis_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_redis()
    with RedisServer(tmp_path) as server:
        assert place_checks.redis(load({"redis": server.url})).state is State.OK
        with server.client() as client:
            assert client.keys("*") == []
            client.acl_setuser("weak", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-xadd"])
        weak = place_checks.redis(load({"redis": f"redis://weak:pw@127.0.0.1:{server.port}"}))
        assert (weak.state, "xadd" in weak.found.lower()) == (State.FAILED, True)
        wrong = place_checks.redis(load({"redis": f"redis://weak:no@127.0.0.1:{server.port}"}))
        assert (wrong.state, "password" in wrong.found) == (State.FAILED, True)
        monkeypatch.setattr(place_checks, "OLDEST_REDIS", (99, 0))
        assert place_checks.redis(load({"redis": server.url})).state is State.WARNING


@pytest.mark.parametrize(
    ("status", "code", "state", "said"),
    [
        (503, "unhealthy", State.WARNING, "Server"),  # of every route: even its facts cannot be had
        (401, "invalid_api_key", State.FAILED, "key"),
        (403, "missing_scope", State.FAILED, "key"),
    ],
)
def test_a_server_that_refuses(fake: FakeServer, status: int, code: str, state: State, said: str) -> None:
    fake.refuse = error(status, code, "Server: the key may not do this.")
    with Client(fake.url) as client:
        finding = place_checks.server(client)
    assert (finding.state, said in finding.found) == (state, True)


@pytest.mark.parametrize(
    ("path", "code", "state", "said"),
    [
        ("/health", "unhealthy", State.FAILED, "stuck or dead"),
        ("/ready", "not_ready", State.WARNING, "takes no work"),
        ("/ready", "store_unavailable", State.FAILED, "store"),
    ],
)
def test_a_server_in_trouble(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str, code: str, state: State, said: str
) -> None:
    probe = Client.probe
    monkeypatch.setattr(Client, "probe", lambda self, asked: (503, code) if asked == path else probe(self, asked))
    with Client(fake.url) as client:
        finding = place_checks.server(client)
    assert (finding.state, said in finding.found) == (state, True)


def test_a_probe_tells_status_and_code(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        assert client.probe("/health") == (200, "")
        fake.refuse = error(503, "unhealthy", "no")
        assert client.probe("/health") == (503, "unhealthy")


def test_a_server_of_another_version(fake: FakeServer) -> None:
    fake.refuse = JSONResponse({"model_id": "tiny", "version": "99.0"})
    with Client(fake.url) as client:
        finding = place_checks.server(client)
    assert (finding.state, "version 99.0" in finding.found) == (State.WARNING, True)
