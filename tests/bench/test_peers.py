"""The bench's way to a peer: the line protocol with a fake one, the rounds, and streams over a socket."""

import asyncio
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from tests.bench.client import Call, LoadClient, run_of
from tests.bench.line_peer import LinePeer
from tests.bench.peers.protocol import Request, Run
from tests.bench.results import Results
from tests.bench.rounds import rounds
from tests.bench.workload import Case

ONE = Request("text", None, 4)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[LinePeer]:
    peer = LinePeer("fake", sys.executable, "tests.bench.fake_peer", log=tmp_path / "log")
    yield peer
    peer.close()


def test_runs_and_failures_of_a_peer(peer: LinePeer) -> None:
    assert peer.facts == {"version": "1"}
    assert peer.run([ONE, Request("more", "a1", 6)]) == Run(0.5, 10)
    with pytest.raises(RuntimeError, match="ValueError: no such adapter"):
        peer.run([Request("fail")])
    with pytest.raises(RuntimeError, match="made 3 tokens instead of 4"):
        peer.run([Request("short", None, 4)])
    assert peer.run([ONE]).rate == 8


def test_a_peer_that_dies_is_named_with_its_last_words(peer: LinePeer) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fake ended with 3; its log: .*out of memory"):
            peer.run([Request("die")])


def test_a_peer_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        LinePeer("absent", sys.executable, "tests.bench.no_such_peer", log=tmp_path / "log")


class Scripted:
    """Makes every token in a second, but fails at one number of requests."""

    facts: dict[str, str] = {}  # noqa: RUF012 - a Peer's attribute

    def __init__(self, name: str, fails_at: int, calls: list[tuple[str, int, int]]) -> None:
        self.name = name
        self._fails_at = fails_at
        self._calls = calls

    def run(self, requests: Sequence[Request]) -> Run:
        self._calls.append((self.name, len(requests), requests[0].new_tokens))
        if len(requests) == self._fails_at:
            raise RuntimeError("too many")
        return Run(1.0, sum(request.new_tokens for request in requests))

    def close(self) -> None:
        self._calls.clear()


def test_rounds_take_turns_and_leave_out_what_fails() -> None:
    calls: list[tuple[str, int, int]] = []
    one, eight, results = Case(0, 1), Case(0, 8), Results()
    found = rounds(results, 2, [Scripted("a", 0, calls), Scripted("b", 8, calls)], [one, eight])
    assert calls == [("a", 1, 4), ("b", 1, 4), ("a", 8, 4), ("b", 8, 4)] + 2 * [
        ("a", 1, 64),
        ("b", 1, 64),
        ("a", 8, 64),
    ]
    assert {key: [run.rate for run in runs] for key, runs in found.items()} == {
        (one, "a"): [64, 64],
        (one, "b"): [64, 64],
        (eight, "a"): [512, 512],
    }
    assert list(results.skipped.values()) == ["too many"]


@pytest.fixture
def server() -> Iterator[str]:
    """Streams as many events as the body says, in a loop of its own."""
    loop = asyncio.new_event_loop()
    ready: list[str] = []
    under_way, most = 0, 0

    async def stream(request: web.Request) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range((await request.json())["events"]):
            await response.write(f'data: {{"number": {number}, "most": {most}}}\n\n'.encode())
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        under_way -= 1
        return response

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/stream", stream)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield ready[0]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_streams_over_a_socket(server: str) -> None:
    with LoadClient(server) as client:
        seconds, streams = client.run([Call("/stream", {"events": count}) for count in (3, 1, 5, 2)], at_once=1)
        assert [len(stream.times) for stream in streams] == [3, 1, 5, 2]
        assert streams[2].last == b'{"number": 4, "most": 1}'
        assert all(stream.times == sorted(stream.times) and stream.times[-1] <= seconds for stream in streams)
        with pytest.raises(RuntimeError, match="/nowhere answered 404"):
            client.run([Call("/nowhere", {})])


def test_first_tokens_and_gaps_of_streams() -> None:
    run = run_of(2.0, 5, [[0.5, 0.75, 1.0], [1.0, 2.0]])
    assert (run.rate, run.first, run.gaps) == (2.5, [0.5, 1.0], [0.25, 0.25, 1.0])
