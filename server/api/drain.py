"""The time between the order to stop and the end: running requests finish, new ones are sent elsewhere."""

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import NotReady

PROBES = frozenset({"/health", "/ready", "/metrics"})


class Drain:
    """Whether the server is told to stop, and how many requests it still owes an answer."""

    def __init__(self) -> None:
        self.active = False
        self.running = 0


class DrainGate:
    """ASGI middleware that counts requests, and refuses them while draining; probes always pass, uncounted."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
        elif self._drain.active:
            error = NotReady("The server is stopping and takes no new requests. Send this one elsewhere, or again.")
            # The connection would be cut soon: the next request must not be sent over it.
            await error_response(Request(scope), error, {"Connection": "close"})(scope, receive, send)
        else:
            self._drain.running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._drain.running -= 1
