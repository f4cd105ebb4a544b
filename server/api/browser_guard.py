"""Keeps web pages out: a browser on the operator's machine reaches a server that the network does not."""

import re
from collections.abc import Collection
from ipaddress import ip_address

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters_store.errors import CodedError
from server.api.errors import BadHost, OriginNotAllowed, error_response
from server.api.services import ApiSettings

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]*))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class BrowserGuard:
    """ASGI middleware against forged requests (a page's form posts here) and DNS rebinding (a page's own name suddenly
    leads here, so that the browser takes this server for the page's). Other programs send no Origin and the right Host.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._loopback_only = settings.loopback_only
        self._allowed = settings.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(Request(scope), refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> CodedError | None:
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if self._loopback_only and not all(_is_here(host, self._allowed) for host in hosts):
            text = "The Host header names another server. This one answers to localhost and its own address only."
            return BadHost(text, param="Host")
        if scope["method"] in _READING or all(self._may_change(origin, hosts) for origin in origins):
            return None
        text = "A web page of another host may not change anything here. Send the request without the Origin header."
        return OriginNotAllowed(text, param="Origin")

    def _may_change(self, origin: str, hosts: list[str]) -> bool:
        scheme, _, authority = origin.partition("://")
        name, port = _split(authority)
        default = _DEFAULT_PORTS.get(scheme)  # of both: the browser's scheme is not ours behind a proxy that ends TLS
        same = [(name, port or default)] == [(own, own_port or default) for own, own_port in map(_split, hosts)]
        return bool(name) and (same or name in self._allowed)


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name == wanted]


def _split(authority: str) -> tuple[str, str | None]:
    """Name and port; an empty name for what is none, such as the origin `null` of a local file."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1], match[2]) if match else ("", None)


def _is_here(host: str, allowed: Collection[str]) -> bool:
    name, _ = _split(host)
    try:
        return name == "localhost" or name in allowed or ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
