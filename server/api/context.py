"""What surrounds every request: its id, its headers, its metrics, and the last net under unexpected errors."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.current import CURRENT, Current, trace_id_of
from server.api.dependencies import CALLER
from server.api.disconnect import to_the_end
from server.api.drain import PROBES
from server.api.errors import UnexpectedError, error_response, stopped
from server.api.services import Audit
from server.api.tracing import RequestSpan, Tracer
from server.api.writes import WRITE, Write, write_line
from server.metrics import Metrics

REQUEST_ID = "polyrank.request_id"
ANSWER_HEADERS = "polyrank.headers"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)
LAST_WORDS_SECONDS = 1.0


class RequestContext:
    """ASGI middleware. A plain one: starlette's BaseHTTPMiddleware would hide the client's disconnect."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, audit: Audit | None = None, tracer: Tracer | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._audit = audit
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[REQUEST_ID] = _request_id(scope)
        span = self._span(scope)
        trace_id = span.trace_id if span else trace_id_of(scope["headers"])
        current = Current(scope[REQUEST_ID], trace_id, [] if span else None)
        token = CURRENT.set(current)
        try:
            await self._answered(scope, receive, send, span)
        finally:
            CURRENT.reset(token)

    def _span(self, scope: Scope) -> RequestSpan | None:
        if self._tracer is None or scope["path"] in PROBES:
            return None
        return self._tracer.begin(scope["method"], scope["headers"])

    async def _answered(self, scope: Scope, receive: Receive, send: Send, span: RequestSpan | None) -> None:
        answer = _Answer(scope, send, self._note)
        started = time.perf_counter()
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:  # the server stops and waits no longer
            if not answer.status:
                await to_the_end(_last_words(error_response(Request(scope), stopped()), scope, receive, answer.send))
            # Not raised on: nobody waits for this task, and uvicorn would log it as an exception in the application.
            _log.warning("request_cut", extra={"request_id": scope[REQUEST_ID]})
        except Exception:
            if answer.lost:
                return
            _log.exception("request_failed", extra={"request_id": scope[REQUEST_ID]})
            if answer.status:  # half an answer is out: let the server cut the connection
                raise
            await error_response(Request(scope), UnexpectedError())(scope, receive, answer.send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            status = answer.status or 499
            await self._note(scope, status)
            seconds = time.perf_counter() - started
            self._metrics.http_answer(scope["method"], route, status, seconds)
            if code := scope.get("polyrank.error_code"):
                self._metrics.rejected(code)
            _log_answer(scope, route, status, seconds)
            if span is not None:
                current = CURRENT.get()
                span.end(route, status, _span_facts(scope), (current and current.timelines) or ())

    async def _note(self, scope: Scope, status: int) -> None:
        """The line in the record of changes, before the client is told."""
        write: Write | None = scope.get(WRITE)
        if write is not None and self._audit is not None and not write.noted:
            write.noted = True
            line = write_line(scope, write, status, scope[REQUEST_ID])
            await to_the_end(asyncio.to_thread(self._audit.write, line))


def _log_answer(scope: Scope, route: str, status: int, seconds: float) -> None:
    """One line per request, without its content; probes and scrapes only where debugging is asked for."""
    facts: dict[str, Any] = {"method": scope["method"], "route": route, "status": status}
    facts |= {"ms": round(seconds * 1000, 1), "request_id": scope[REQUEST_ID]}
    named = {"adapter": scope.get(ANSWER_HEADERS, {}).get("X-Adapter"), **scope.get("path_params", {})}
    facts |= {name: str(value)[:100] for name, value in named.items() if value is not None and name not in facts}
    if (caller := scope.get(CALLER)) is not None and caller.key_id is not None:
        facts["key"] = caller.key_id
    if code := scope.get("polyrank.error_code"):
        facts["code"] = code
    _log.log(logging.DEBUG if route in PROBES else logging.INFO, "request", extra={"answer": facts})


def _span_facts(scope: Scope) -> dict[str, str]:
    """Who answered, and the error: nothing of the content."""
    headers = scope.get(ANSWER_HEADERS, {})
    found = {
        "request_id": scope[REQUEST_ID],
        "adapter": headers.get("X-Adapter"),
        "digest": headers.get("X-Adapter-Digest"),
        "code": scope.get("polyrank.error_code"),
    }
    return {name: str(value) for name, value in found.items() if value}


async def _last_words(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await answer(scope, receive, send)


class _Answer:
    """Adds our headers when the answer starts, and remembers its status. before: is called then, with the status."""

    def __init__(self, scope: Scope, send: Send, before: Callable[[Scope, int], Awaitable[None]]) -> None:
        self._scope = scope
        self._send = send
        self._before = before
        self.status = 0
        self.lost = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._before(self._scope, message["status"])
            self.status = message["status"]
            extra = {"X-Request-Id": self._scope[REQUEST_ID], **self._scope.get(ANSWER_HEADERS, {})}
            encoded = [(name.lower().encode("latin-1"), _header_bytes(value)) for name, value in extra.items()]
            message = {**message, "headers": [*message.get("headers", []), *encoded]}
        try:
            await self._send(message)
        except OSError:  # the client is gone
            self.lost = True
            raise


def _header_bytes(value: str) -> bytes:
    return re.sub(r"[^\x20-\x7e]", "?", value).encode("ascii")


def _request_id(scope: MutableMapping[str, Any]) -> str:
    """The client's id if it is short and plain (it ends in logs and headers), else a new one."""
    for name, value in scope["headers"]:
        text = str(value, "latin-1")
        if name == b"x-request-id" and _SANE_ID.fullmatch(text):
            return text
    return secrets.token_hex(16)


def new_call_id(request: Request) -> str:
    """For the engine and the answer's `id`: the request's id, made unique, as clients send theirs more than once."""
    return f"{request.scope[REQUEST_ID]}-{secrets.token_hex(4)}"


def add_answer_header(request: Request, name: str, value: str) -> None:
    """A header for this request's answer, whatever becomes of it."""
    request.scope.setdefault(ANSWER_HEADERS, {})[name] = value
