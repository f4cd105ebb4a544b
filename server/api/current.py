"""The request that is being answered, for whatever is logged or traced on its way."""

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from server.engine.request import Timeline

# W3C Trace Context, level 1: version, trace id, parent id, flags; later versions may append more.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


@dataclass(slots=True)
class Current:
    """trace_id: 32 hex digits, or empty. timelines: of its generations that ended; None where nobody traces."""

    request_id: str
    trace_id: str = ""
    timelines: list[Timeline] | None = None


CURRENT: ContextVar[Current | None] = ContextVar("current", default=None)


def trace_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The trace that the client says the request belongs to; empty without a valid `traceparent`."""
    given = [str(value, "latin-1").strip() for name, value in headers if name == b"traceparent"]
    found = _TRACEPARENT.fullmatch(given[0]) if len(given) == 1 else None
    if found is None or (found[1] == "00" and found[3]):
        return ""
    return found[2]
