"""`polyrank serve`: its options are those of Settings, and it says where it is."""

import json
import shlex
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adapters_store.errors import AdapterNotFound
from server.commands import serve
from server.settings import Settings, flag, load, variable
from tests.cli.conftest import Polyrank, peft_folder
from tests.cli.fake_server import FakeServer

EVERYWHERE = "0.0.0.0"  # noqa: S104 - passed on, never bound


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that reached `server.app.run`, which is not run."""
    calls: list[Settings] = []
    app = ModuleType("server.app")
    app.run = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.app", app)
    monkeypatch.setattr(serve, "_announce", lambda settings: None)
    monkeypatch.setattr(serve, "why_not_bind", lambda settings: None)
    return calls


def test_every_option_is_offered(polyrank: Polyrank) -> None:
    text = " ".join(polyrank("serve", "--help").out.split())
    for name in Settings.model_fields:
        assert f"{flag(name)} " in text
        assert f"[env: {variable(name)};" in text


def test_every_kind_of_model_is_offered(polyrank: Polyrank) -> None:
    help_text = " ".join(polyrank("serve", "--help").out.split()).partition("--store")[0]
    for kind in ("a folder", "`.gguf` file", "Hugging Face id", "`smollm2`"):
        assert kind in help_text


def test_flags_and_environment(polyrank: Polyrank, started: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_PORT", "8001")
    monkeypatch.setenv("POLYRANK_MAX_RUNNING", "5")
    arguments = ("--port", "8002", "--kv-cache-memory", "2GiB", "--insecure", "--host", EVERYWHERE)
    assert polyrank("serve", *arguments).code == 0
    assert started == [load({"port": 8002, "kv_cache_memory": 2**31, "insecure": True, "host": EVERYWHERE})]
    assert started[0].max_running == 5


def test_bad_values_name_the_flag(polyrank: Polyrank, started: list[Settings]) -> None:
    result = polyrank("serve", "--port", "http", "--max-rank", "0")
    assert result.code == 2
    assert [line.partition(":")[0] for line in result.err.removeprefix("error: ").splitlines()] == [
        "--port=http",
        "--max-rank=0",
    ]
    assert polyrank("serve", "--nonsense").code == 2
    assert started == []


def test_open_to_others_only_when_told(polyrank: Polyrank, started: list[Settings]) -> None:
    result = polyrank("serve", "--host", EVERYWHERE)
    assert result.code == 2
    assert "--insecure" in result.err
    assert started == []


def test_a_port_in_use(polyrank: Polyrank) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = polyrank("serve", "--port", str(other.getsockname()[1]))
    assert result.code == 1
    assert result.err.startswith("error: cannot listen on 127.0.0.1:")
    assert result.err.endswith(" already in use; choose another --port\n")


def test_a_start_that_fails_is_one_line(
    polyrank: Polyrank, started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Settings) -> None:
        raise AdapterNotFound("no such thing")

    monkeypatch.setattr(sys.modules["server.app"], "run", fail)
    result = polyrank("serve")
    assert (result.code, result.err) == (1, "error: no such thing (model_not_found)\n")


def test_says_where_it_is_once_it_is_ready(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft_folder(tmp_path / "adapters" / "legal-v2")
    settings = load({"port": fake.url.rpartition(":")[2], "preload": tmp_path / "adapters"})
    serve._announce(settings)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == f"Polyrank is ready at {fake.url}"
    command = shlex.split(lines[3])
    assert command[:3] == ["curl", "-s", f"{fake.url}/generate?adapter=legal-v2"]
    assert json.loads(command[-1])["inputs"] == serve.EXAMPLE[1]


def test_first_curl_without_the_examples() -> None:
    command = shlex.split(serve.first_curl(load({"host": "::1"})))
    assert command[2] == "http://[::1]:8000/generate"
