"""Sends requests over real sockets, reads the streams, and notes when each token came."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from tests.bench.peers.protocol import Run


@dataclass(frozen=True, slots=True)
class Call:
    """One POST whose answer is a stream of server-sent events."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stream:
    """When each event came, in seconds since the call was sent, and the last event's data."""

    times: list[float] = field(default_factory=list)
    last: bytes = b""


class LoadClient:
    """One server and a loop of its own. aiohttp: its parser in C leaves the cores to the server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._runner = asyncio.Runner()

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> tuple[float, list[Stream]]:
        """Seconds for all, and every stream; at most `at_once` calls are under way together, all if None."""
        return self._runner.run(self._all(calls, at_once or len(calls)))

    def close(self) -> None:
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _all(self, calls: Sequence[Call], at_once: int) -> tuple[float, list[Stream]]:
        gate = asyncio.Semaphore(at_once)
        timeout = aiohttp.ClientTimeout(total=1800)
        async with aiohttp.ClientSession(
            self._url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout
        ) as session:
            start = time.perf_counter()
            streams = await asyncio.gather(*(self._one(session, call, gate) for call in calls))
            return time.perf_counter() - start, streams

    async def _one(self, session: aiohttp.ClientSession, call: Call, gate: asyncio.Semaphore) -> Stream:
        async with gate:
            start = time.perf_counter()
            times, last = [], b""
            async with session.post(call.path, json=call.body) as response:
                if response.status != 200:
                    raise RuntimeError(f"{call.path} answered {response.status}: {(await response.text())[:300]}")
                async for line in response.content:
                    data = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data != b"[DONE]":
                        times.append(time.perf_counter() - start)
                        last = data
            return Stream(times, last)


def run_of(seconds: float, tokens: int, times: Sequence[Sequence[float]]) -> Run:
    """The run of streams whose tokens came at `times`."""
    gaps = [after - before for own in times for before, after in itertools.pairwise(own)]
    return Run(seconds, tokens, [own[0] for own in times], gaps)
