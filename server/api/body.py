"""JSON bodies: read with a limit, parsed strictly, before any route sees them."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from server.api.access import needs_of
from server.api.dependencies import services_of
from server.api.errors import BadBody, ClientGone, UnsupportedMediaType, UploadIncomplete
from server.errors import PayloadTooLarge

# These keep every turn of the loop below 50 ms. Measured at 2 MiB or 200,000 values, on two cores in use: 100,000 keys
# 21 ms, 180,000 keys (refused) 30 ms, 200,000 token ids 20 ms, 20,000 nested lists 13 ms, 17,000 message parts 32 ms,
# a text 10 ms. Before: up to 1 s. Lists in lists are the costliest values: 200,000 take 0.37 s to parse. A repeated key
# among 100,000 takes 58 ms to find, so among more than MAX_NAMED it is not named.
MAX_VALUES = 200_000
MAX_CONTAINERS = 20_000
MAX_NAMED = 20_000
LARGE = 64 << 10


class JsonRequest(Request):
    """A request whose body was read and parsed by `load`, so that FastAPI finds both ready."""

    _value: Any = None
    _raw: bytes = b""

    async def load(self, limit: int, seconds: float, required: bool) -> None:
        self._raw = await read_body(self, limit, seconds)
        if not self._raw and not required:
            return
        kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise UnsupportedMediaType("This route reads JSON: send the header `Content-Type: application/json`.")
        pairs = count_pairs(self._raw)
        await self._turn()
        value = parse_object(self._raw)
        await self._turn()
        if pairs != count_keys(value):
            refuse_repeated(self._raw, pairs)
        await self._turn()
        self._value = value

    async def _turn(self) -> None:
        """Lets others run between the steps of a large body. A thread would not help: each step keeps the GIL."""
        if len(self._raw) > LARGE:
            await asyncio.sleep(0)

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body. Stops reading at the limit, whether declared or counted."""
    too_large = PayloadTooLarge(f"The JSON body is larger than {limit} bytes.", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise UploadIncomplete(f"The body did not arrive within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise ClientGone("The client left before its request was read.") from None
    return b"".join(pieces)


def count_pairs(raw: bytes) -> int:
    """How many keys the body's objects have. Refuses what would take long to parse, before it is parsed.

    Not by a regular expression: that starts again at every quote of a body whose last string has no end.
    """
    without_escapes = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = without_escapes.count(b'"') // 2
    if strings <= MAX_VALUES:
        outside = b"".join(without_escapes.split(b'"')[::2])
        pairs = outside.count(b":")
        if outside.count(b"{") + outside.count(b"[") > MAX_CONTAINERS:
            raise BadBody(f"The body holds more than {MAX_CONTAINERS} objects and lists.")
        if outside.count(b",") + pairs <= MAX_VALUES:
            return pairs
    raise BadBody(f"The body holds more than {MAX_VALUES} keys and values.")


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. NaN, bad UTF-8, lone surrogates and nesting beyond 200 levels are refused."""
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadBody(f"The body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadBody(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


def count_keys(value: dict[str, Any]) -> int:
    """Keys of all objects, at any depth."""
    found = 0
    waiting: list[dict[str, Any] | list[Any]] = [value]
    while waiting:
        each = waiting.pop()
        items: Iterable[Any] = each
        if isinstance(each, dict):
            found += len(each)
            items = each.values()
        waiting += [item for item in items if isinstance(item, dict | list)]
    return found


def refuse_repeated(raw: bytes, pairs: int) -> None:
    """Of two equal keys a parser keeps the last, so that nobody can say which adapter was meant."""
    if pairs <= MAX_NAMED:
        json.loads(raw.decode(), object_pairs_hook=_refuse_repeated)
    raise BadBody("The body has a key twice in one object. Give it once.")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            text = f"The body has the key `{key[:64]}` twice in one object. Give it once."
            raise BadBody(text, param=key[:64])
        seen.add(key)


class JsonRoute(APIRoute):
    """Routes with a JSON body go through JsonRequest; the others are left as they are."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        required, needs = self.body_field.field_info.is_required(), needs_of(self)

        async def handle_json(request: Request) -> Response:
            await needs(request)  # FastAPI would come to it when the body is read
            settings = services_of(request).settings
            ready = JsonRequest(request.scope, request.receive)
            await ready.load(settings.max_json_bytes, settings.upload_idle_seconds, required)
            return await handle(ready)

        return handle_json
