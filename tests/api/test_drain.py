"""From the signal to the end of the process: what runs finishes, what comes is refused, all are answered."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api.services import Services
from tests.api.asgi import Call, until
from tests.api.events import frames, openai_error, tgi_error
from tests.api.fake_engine import FakeEngine
from tests.api.test_disconnect import Slow
from tests.support.server_process import free_port

BODY = {"prompt": "hi", "stream": True}
PATIENCE = 30.0  # seconds; far less than the drain where a test waits for an end before it


@dataclass(frozen=True)
class Service:
    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def answer(self) -> None:
        """Let the running requests finish."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ready(self) -> int:
        return httpx.get(f"{self.url}/ready").status_code

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def service(tmp_path: Path, drain_seconds: float) -> Iterator[Service]:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "tests.api.slow_service", str(port), str(drain_seconds)]
    with log.open("w") as lines:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=lines, text=True, preexec_fn=_heed_ctrl_c, bufsize=1
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # nothing to wait on but the port
        yield Service(f"http://127.0.0.1:{port}", port, process, log)
    finally:
        process.kill()
        process.communicate()


def _heed_ctrl_c() -> None:
    """A test run in the background of a shell inherits an ignored SIGINT, and so would the server."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def drained(server: Service) -> None:
    """Wait until the signal has arrived."""
    deadline = time.monotonic() + PATIENCE
    while server.ready() != 503:
        assert time.monotonic() < deadline


def post(server: Service) -> socket.socket:
    """A connection over which a whole request has been sent."""
    body = json.dumps({"prompt": "hi"}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_what_runs_finishes_and_what_comes_is_refused(tmp_path: Path) -> None:
    with service(tmp_path, 600) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as running:
            pieces = running.iter_raw()
            seen = next(pieces)
            server.process.send_signal(signal.SIGTERM)
            drained(server)
            assert httpx.get(f"{server.url}/health").status_code == 200
            refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
            openai_error(refused, 503, "not_ready")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("2", "close")
            server.answer()
            seen += b"".join(pieces)
        assert frames(seen)[-1] == "[DONE]"
        assert json.loads(frames(seen)[-2])["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()


def test_at_the_deadline_the_rest_is_told_and_cut(tmp_path: Path) -> None:
    with service(tmp_path, 0.5) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as running:
            server.process.send_signal(signal.SIGTERM)
            seen = running.read()
        assert json.loads(frames(seen)[-1])["error"]["code"] == "request_aborted"
        assert server.end() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_waiting(tmp_path: Path, second: signal.Signals) -> None:
    with service(tmp_path, 600) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as running:
            server.process.send_signal(signal.SIGTERM)
            drained(server)
            server.process.send_signal(second)
            seen = running.read()
        assert json.loads(frames(seen)[-1])["error"]["code"] == "request_aborted"
        assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with service(tmp_path, 600) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/ready").status_code == 200  # and its connection stays open
        server.process.send_signal(number)
        assert server.end() == 0


def test_a_request_that_has_arrived_is_answered(tmp_path: Path) -> None:
    """The server stands still while requests and the signal arrive: it finds all of them at once."""
    with service(tmp_path, 600) as server:
        server.process.send_signal(signal.SIGSTOP)
        connections = [post(server) for _ in range(8)]
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        server.answer()
        for connection in connections:
            with connection:
                assert re.match(rb"HTTP/1.1 (200|503) ", connection.recv(1 << 16))
        assert server.end() == 0
        assert server.log.read_text().count("route=") == len(connections)


def test_a_port_that_is_taken_at_the_last_moment_is_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, "-m", "tests.api.slow_service", str(other.getsockname()[1]), "1"]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (ended.returncode, "address already in use" in ended.stderr) == (1, True)


HANGING = """
import sys, threading, time
from server import logs
from server.serving import _LastResort
logs.configure("info", "text")
last = _LastResort()
last.end_by(time.monotonic() + 600)
last.end_by(time.monotonic() + 0.1)
threading.Event().wait()
"""


def test_what_hangs_does_not_keep_the_process() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, "ended_without_waiting" in ended.stderr) == (0, True)


async def test_answers_that_begin_while_draining_end_their_connection(
    services: Services, client: httpx.AsyncClient
) -> None:
    assert "connection" not in (await client.get("/health")).headers
    services.drain.active = True
    for path in ("/health", "/ready", "/v1/models"):
        assert (await client.get(path)).headers.get_list("connection") == ["close"]


async def test_only_probes_pass_while_draining(services: Services, client: httpx.AsyncClient) -> None:
    services.drain.active = True
    openai_error(await client.get("/ready"), 503, "not_ready")
    for path in ("/health", "/metrics"):
        assert (await client.get(path)).status_code == 200
    openai_error(await client.delete("/adapters/legal"), 503, "not_ready")
    answer = await client.post("/generate", json={"inputs": "hi"})
    tgi_error(answer, 503, "not_ready")
    assert answer.headers["x-request-id"]


async def test_what_runs_is_counted_to_its_end(services: Services, api: FastAPI, engine: FakeEngine) -> None:
    slow = Slow(engine, 1)
    async with Call(api, "POST", "/v1/completions", body=BODY):
        await slow.waiting.wait()
        assert services.drain.running == 1
        async with Call(api, "GET", "/health") as probe:
            await probe.read()
            assert services.drain.running == 1
    await until(lambda: services.drain.running == 0)
