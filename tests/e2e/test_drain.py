"""SIGTERM to servers under load: every answer that was begun is whole, and nobody is turned away without a word."""

import json
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.support.models import save_tiny
from tests.support.nursery import BornServer, Nursery

GRACE = 20.0  # seconds; far more than the running answers need
CLIENTS = 4
TOKENS = (20, 120)  # of an answer, from and to
OPTIONS = (
    "--no-compile",
    "--log-format",
    "json",
    "--kv-cache-memory",
    "4MiB",
    "--adapter-memory",
    "4MiB",
    "--device-memory",
    "8MiB",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("drain") / "base", "llama")


@dataclass
class Seen:
    """What the clients of one server saw."""

    whole: int = 0
    truncated: list[str] = field(default_factory=list)
    told: int = 0  # 503 with Retry-After
    other: list[str] = field(default_factory=list)
    refused: list[datetime] = field(default_factory=list)  # when connections were
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, whole: bool, text: str) -> None:
        with self.lock:
            if whole:
                self.whole += 1
            else:
                self.truncated.append(text[-300:])


def one(client: httpx.Client, seen: Seen, tokens: int, stream: bool) -> bool:
    """One request; false once the server has gone."""
    body = {"model": "base", "prompt": "the answer", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    text, status = "", 0
    try:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            status = answer.status_code
            for piece in answer.iter_text():
                text += piece
            headers = answer.headers
    except httpx.TransportError as error:
        if status == 200:
            seen.answered(False, f"{error!r}: {text}")
        with seen.lock:
            seen.refused.append(datetime.now(UTC))
        return False
    if status == 200:
        seen.answered(text.endswith("data: [DONE]\n\n") if stream else json.loads(text)["usage"] is not None, text)
    elif status == 503 and "retry-after" in headers:
        with seen.lock:
            seen.told += 1
    else:
        with seen.lock:
            seen.other.append(f"{status} {text[:300]}")
    return True


def load(server: BornServer, seen: Seen, seed: int) -> None:
    """One client, one request after the other, some over a kept connection, until the server has gone."""
    chance = random.Random(seed)
    client = httpx.Client(base_url=server.url, timeout=60)
    while one(client, seen, chance.randint(*TOKENS), chance.random() < 0.7):
        if chance.random() < 0.5:
            client.close()
            client = httpx.Client(base_url=server.url, timeout=60)
    client.close()


def drain_under_load(nursery: Nursery, base: Path, folder: Path, seed: int) -> Seen:
    chance, seen = random.Random(seed), Seen()
    options = ("--model", str(base), "--store", "memory://", "--drain-seconds", str(GRACE), *OPTIONS)
    server = BornServer(nursery, *options, log=folder / f"log-{seed}")
    with server, ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(load, server, seen, seed * CLIENTS + each) for each in range(CLIENTS)]
        wanted = chance.randint(1, 6)
        while seen.whole < wanted and not any(client.done() for client in running):
            time.sleep(0.005)  # the clients count
        told = time.monotonic()
        server.signal(signal.SIGTERM)
        code = server.wait()
        seconds = time.monotonic() - told
        for client in running:
            client.result()
    log = server.log.read_text()
    assert (code, seconds < GRACE + 2) == (0, True), log[-3000:]
    assert not seen.truncated
    assert not seen.other
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    [closing] = [place for place, line in enumerate(lines) if line["event"] == "Shutting down"]
    assert min(seen.refused) >= datetime.fromisoformat(lines[closing]["timestamp"]), "refused before the end"
    assert not [line for line in lines[closing:] if line.get("status") == 200], "an answer was owed at the end"
    assert "Traceback" not in log
    assert "ended_without_waiting" not in log
    return seen


def test_drains_under_load(nursery: Nursery, base: Path, tmp_path: Path) -> None:
    seen = [drain_under_load(nursery, base, tmp_path, seed) for seed in range(5)]
    assert sum(each.told for each in seen) > 0


@pytest.mark.deep
def test_a_hundred_drains_under_load(nursery: Nursery, base: Path, tmp_path: Path) -> None:
    seen = [drain_under_load(nursery, base, tmp_path, seed) for seed in range(100)]
    print(f"{sum(each.whole for each in seen)} whole, {sum(each.told for each in seen)} told to go elsewhere")


def test_at_the_deadline_streams_end_with_an_error_and_the_process_ends(
    nursery: Nursery, base: Path, tmp_path: Path
) -> None:
    options = ("--model", str(base), "--store", "memory://", "--drain-seconds", "0.3", *OPTIONS)
    server = BornServer(nursery, *options, log=tmp_path / "log")
    body = {"prompt": "the answer", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 16}
    with server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            told = time.monotonic()
            server.signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        code = server.wait()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_aborted"
    assert (code, time.monotonic() - told < 2.3) == (0, True), server.log.read_text()[-3000:]


def test_a_second_signal_ends_at_once(nursery: Nursery, base: Path, tmp_path: Path) -> None:
    options = ("--model", str(base), "--store", "memory://", "--drain-seconds", "600", *OPTIONS)
    server = BornServer(nursery, *options, log=tmp_path / "log")
    body = {"prompt": "the answer", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/ready").status_code == 200:
                pass
            told = time.monotonic()
            server.signal(signal.SIGINT)
            assert any("request_aborted" in line or "[DONE]" in line for line in lines)
        code = server.wait()
    assert (code, time.monotonic() - told < 2) == (0, True), server.log.read_text()[-3000:]
