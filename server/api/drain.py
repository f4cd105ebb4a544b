"""The time between the order to stop and the end: running requests finish, new ones are sent elsewhere."""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import NotReady

PROBES = frozenset({"/health", "/ready", "/metrics"})


class Drain:
    """Whether the server is told to stop, and how many requests it still owes an answer."""

    def __init__(self) -> None:
        self.active = False
        self.running = 0


class DrainGate:
    """ASGI middleware that counts requests, and refuses them while draining; probes always pass, uncounted.

    Every answer that begins while draining ends its connection: it would be cut soon, and the next request with it.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.active:
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["path"] in PROBES:
            await self._app(scope, receive, closing)
        elif self._drain.active:
            error = NotReady("The server is stopping and takes no new requests. Send this one elsewhere, or again.")
            await error_response(Request(scope), error)(scope, receive, closing)
        else:
            self._drain.running += 1
            try:
                await self._app(scope, receive, closing)
            finally:
                self._drain.running -= 1
