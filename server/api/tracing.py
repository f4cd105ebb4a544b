"""What the API asks of a tracer; `server.telemetry` is the one there is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from server.engine.request import Timeline

Facts = Mapping[str, str]


class RequestSpan(Protocol):
    """The span of one HTTP request, from when it was begun."""

    @property
    def trace_id(self) -> str: ...
    def end(self, route: str, status: int, facts: Facts, timelines: Sequence[Timeline]) -> None:
        """route: its template. facts: request_id, adapter, digest, code, as far as known. timelines: of the requests to
        the engine; they become spans below this one."""


class Tracer(Protocol):
    """Begins the span of a request below the one that its headers name, if they name one."""

    def begin(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan: ...
    def close(self) -> None:
        """Send what is left. May take as long as the collector does not answer."""
