"""Server-sent events: framing, and a response that releases its source however it ends."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters_store.errors import CodedError
from server.api.disconnect import cancel_all, to_the_end, wait_for_disconnect
from server.api.errors import coded, stopped

DONE = b"data: [DONE]\n\n"
LAST_WORDS_SECONDS = 1.0
_log = logging.getLogger(__name__)

ErrorBody = Callable[[CodedError], dict[str, Any]]


def event(payload: BaseModel, *, exclude_unset: bool = False) -> bytes:
    return b"data: " + payload.model_dump_json(exclude_unset=exclude_unset).encode() + b"\n\n"


def error_event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends `events` until they end, fail, or the client leaves; then always calls `release`.

    Not starlette's StreamingResponse: that one abandons a generator which was never started, and cancels it in a way
    that forbids it to await in its `finally`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], release: Callable[[], Awaitable[None]], error_body: ErrorBody
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._release = release
        self._error_body = error_body
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(scope, send))
        watcher = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server stops and waits no longer
            await to_the_end(self._say_stopped(send, sender))
            raise
        finally:
            await to_the_end(self._finish(sender, watcher))

    async def _say_stopped(self, send: Send, sender: "asyncio.Future[None]") -> None:
        """A last event, so that the client does not take half an answer for a whole one."""
        await cancel_all(sender)
        if self._started:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    data = error_event(self._error_body(stopped()))
                    await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _finish(self, *tasks: "asyncio.Future[None]") -> None:
        await cancel_all(*tasks)
        await self._events.aclose()
        await self._release()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._started = True
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:  # the client is gone
            return
        except Exception as error:
            failure = coded(error)
            if failure is not error:
                _log.exception("stream_failed")
            scope["polyrank.error_code"] = failure.code
            data = error_event(self._error_body(failure))
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
