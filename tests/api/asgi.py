"""One HTTP request spoken in ASGI, so that a test decides when bytes come and when the client leaves."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Self

from fastapi import FastAPI


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until the condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never came to hold"
        await asyncio.sleep(0)


class Call:
    """`async with Call(api, ...)` starts the request; leaving the block hangs up and waits for the server's end."""

    def __init__(
        self,
        api: FastAPI,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: dict[str, str] | None = None,
        query: str = "",
    ) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        found = {"content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in found.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._api = api
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.broken = False  # true: writing to the client fails
        self.status = 0
        self.headers: dict[str, str] = {}
        if body is not None:
            self.send(raw, more=False)

    def send(self, data: bytes, *, more: bool = True) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hang_up()

    async def hang_up(self) -> None:
        """Leave, and wait until the server has cleaned up."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        if self._task is not None:
            await asyncio.wait_for(self._task, 10)

    async def stop(self) -> bool:
        """What a server does to requests that outlast its patience; true if the application lets the error out."""
        assert self._task is not None
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled() or task.exception() is not None

    async def _run(self) -> None:
        try:
            await self._api(self._scope, self._give, self._take)
        finally:
            self._outgoing.put_nowait(None)

    async def _give(self) -> dict[str, Any]:
        message = await self._incoming.get()
        if message["type"] == "http.disconnect":
            self._incoming.put_nowait(message)  # said again to whoever asks again, as real servers do
        return message

    async def _take(self, message: Any) -> None:
        if self.broken:
            raise OSError("the client is gone")
        self._outgoing.put_nowait(message)

    async def read(self) -> bytes | None:
        """The next piece of the answer, None after the last. Sets status and headers on the way."""
        while (message := await asyncio.wait_for(self._outgoing.get(), 10)) is not None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message["body"]:
                body: bytes = message["body"]
                return body
        return None

    async def whole(self) -> bytes:
        pieces = []
        while (piece := await self.read()) is not None:
            pieces.append(piece)
        return b"".join(pieces)
