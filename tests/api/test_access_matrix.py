"""Every route of the application, with every kind of key, under every form of its path and of the Host header.

The routes are read from the application, so that one which is added later is tested by itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts

from server.access.key import SCOPES
from server.api import application
from server.api.access import needs_of
from server.api.application import create_api
from server.api.services import Services
from server.metrics import Metrics
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import FakeRegistry
from tests.support.api_keys import YESTERDAY, ApiKeys, bearer

# FastAPI's own, which hold nothing but what the published code says.
DOCUMENTATION = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
OPEN = {"/health", "/ready"}
REFUSALS = ("missing_api_key", "invalid_api_key", "missing_scope")
VALUES = {"filename": "adapter_config.json", "job_id": "j"}  # of path parameters; of all others `legal`
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X")
HOSTS = ("evil.example", "x/health", "x/health?a=", "foo?", "127.0.0.1/ready", "")
HEADERS = (
    {"X-Forwarded-Host": "localhost", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Prefix": "/health"},
    {"X-Original-URL": "/health", "X-Rewrite-URL": "/health", "X-HTTP-Method-Override": "GET"},
    {"Authorization": "Basic cG9seTpyYW5r", "Cookie": "key=1"},
)


@dataclass(frozen=True)
class Call:
    """One method of one route."""

    method: str
    path: str
    needs: frozenset[str]
    parameters: frozenset[str] = field(default=frozenset())

    def filled(self, name: str = "legal") -> str:
        values = {each: VALUES.get(each, name) for each in self.parameters}
        return self.path.replace(":path}", "}").format(**values)


def calls(api: FastAPI) -> Iterator[Call]:
    for context in iter_route_contexts(api.routes):
        route = context.original_route
        if not isinstance(route, APIRoute):
            assert getattr(route, "path", None) in DOCUMENTATION
            continue
        for method in sorted(route.methods or ()):
            yield Call(method, route.path, needs_of(route).scopes, frozenset(route.param_convertors))


async def ask(
    api: FastAPI, method: str, path: str, headers: dict[str, str], body: bytes = b"{}", raw: bytes | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """A request spoken in ASGI, for a client would mend the path. Status, body and headers."""
    sent = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    got: list[Any] = []

    async def receive() -> Any:
        return sent.pop(0) if len(sent) > 1 else sent[0]

    async def send(message: Any) -> None:
        got.append(message)

    told = {"host": "polyrank", "content-type": "application/json", **{k.lower(): v for k, v in headers.items()}}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw or path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in told.items()],
        "client": ("10.1.2.3", 1),
        "server": ("10.0.0.1", 80),
    }
    await api(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in got[0]["headers"]}
    return got[0]["status"], b"".join(each.get("body", b"") for each in got[1:]), found


def code_of(body: bytes) -> str | None:
    """The code of an error, in either shape."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    error = told.get("error") if isinstance(told, dict) else None
    return error["code"] if isinstance(error, dict) else told.get("error_type") if error else None


def path_forms(path: str) -> Iterator[str]:
    """The same path as a router, a proxy or a careless comparison might read it."""
    yield from (f"/{path}", path.replace("/", "//"), f"{path}/", f"{path}//", path.upper(), f"{path};x")
    yield from (f"/health/..{path}", f"/./{path.lstrip('/')}", f"{path}%2f", f"{path}\x00", f"{path} ", f"{path}.json")
    yield from (f"/health{path}", f"/ready/../{path.lstrip('/')}", path.replace("/", "\\"), f"/%2e%2e{path}")


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys()


@pytest.fixture
def guarded(services: Services, keys: ApiKeys) -> FastAPI:
    return create_api(replace(services, keys=keys, metrics=Metrics()))


@pytest.fixture
def bad(keys: ApiKeys) -> dict[str, tuple[str | None, str]]:
    """Keys that nobody may use, and the code of their refusal."""
    right = keys.make()
    wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
    found = {
        "wrong": wrong,
        "unknown": "pr_aaaaaaaa_" + "x" * 43,
        "garbage": "sk-1234",
        "long": "pr_" + "x" * 5000,
        "revoked": keys.make(revoked=YESTERDAY),
        "expired": keys.make(expires=YESTERDAY),
        "hash": keys.ring.keys[0].sha256,
        "id": keys.ring.keys[0].id,
    }
    return {"none": (None, "missing_api_key"), **{name: (key, "invalid_api_key") for name, key in found.items()}}


async def test_no_route_answers_without_a_right_key(
    guarded: FastAPI, bad: dict[str, tuple[str | None, str]], engine: FakeEngine, registry: FakeRegistry
) -> None:
    before = len(registry.added)
    for call in calls(guarded):
        for name, (secret, code) in bad.items():
            status, body, headers = await ask(guarded, call.method, call.filled(), bearer(secret))
            if not call.needs:
                assert call.path in OPEN
                assert status == 200, call
                continue
            assert status == 401, (call, name)
            assert call.method == "HEAD" or code_of(body) == code, (call, name)
            assert headers["www-authenticate"].startswith("Bearer"), (call, name)
            assert secret is None or secret.encode() not in body
    assert not engine.streams
    assert not engine.pins
    assert len(registry.added) == before


async def test_each_scope_opens_its_routes_and_no_others(guarded: FastAPI, keys: ApiKeys) -> None:
    opened = {scope: keys.make(scope) for scope in sorted(SCOPES)}
    for call in calls(guarded):
        for scope, secret in opened.items():
            status, body, _ = await ask(guarded, call.method, call.filled(), bearer(secret))
            may = not call.needs or scope == "admin" or scope in call.needs
            refused = code_of(body) in REFUSALS or status == 401
            assert refused is not may, (call, scope, status)
            assert may or status == 403


async def test_no_form_of_path_or_host_lets_anybody_in(
    guarded: FastAPI, keys: ApiKeys, bad: dict[str, tuple[str | None, str]], engine: FakeEngine, registry: FakeRegistry
) -> None:
    """What is no route is 404 or 405; the rest is refused as its plain form is."""
    before = len(registry.added)
    secrets = [None, bad["wrong"][0], bad["revoked"][0]]
    for call in calls(guarded):
        if not call.needs:
            continue
        lacking = sorted(SCOPES - call.needs - {"admin"})
        tried = [*secrets, *([keys.make(lacking[0])] if lacking else [])]
        for secret in tried:
            for path in path_forms(call.filled()):
                status, body, _ = await ask(guarded, call.method, path, bearer(secret))
                assert status in (401, 403, 404, 405) or call.path in OPEN, (call, path, status)
                assert b"legal" not in body or status in (401, 403, 404), (call, path)
            for host in HOSTS:
                status, _, _ = await ask(guarded, call.method, call.filled(), {"Host": host, **bearer(secret)})
                assert status in (401, 403), (call, host, status)
            for headers in HEADERS:
                status, _, _ = await ask(guarded, call.method, call.filled(), {**headers, **bearer(secret)})
                assert status in (401, 403), (call, headers, status)
    assert not engine.streams
    assert len(registry.added) == before


async def test_no_method_lets_anybody_in(guarded: FastAPI) -> None:
    for call in calls(guarded):
        for method in METHODS:
            status, _, _ = await ask(guarded, method, call.filled(), {})
            assert status in (401, 405) or call.path in OPEN, (call, method, status)


async def test_refusals_come_before_the_body_is_read(guarded: FastAPI, keys: ApiKeys) -> None:
    """Also of a body that would be refused, and of one that does not fit the route."""
    for call in calls(guarded):
        if call.needs and call.method in ("POST", "PUT", "PATCH"):
            for body in (b"{", b"[" * 1000, b"x" * (3 << 20)):
                status, _, _ = await ask(guarded, call.method, call.filled(), {}, body)
                assert status == 401, (call, body[:5])


async def test_a_route_that_declares_nothing_is_not_served(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = APIRouter()

    @forgotten.get("/forgotten")
    async def forget() -> None:
        """Open to all by mistake."""

    monkeypatch.setattr(application, "ROUTERS", (*application.ROUTERS, forgotten))
    with pytest.raises(TypeError, match=r"\['GET'\] /forgotten must declare once what it needs"):
        create_api(replace(services, metrics=Metrics()))


async def test_another_tenants_adapter_is_as_if_it_were_not_there(
    guarded: FastAPI, keys: ApiKeys, registry: FakeRegistry
) -> None:
    """Whatever has a name or a digest in its path: the same answer as for one that nobody has."""
    secret = registry.put("secret", tenant="acme")
    stranger = bearer(keys.make(*(SCOPES - {"admin"}), tenant="globex"))
    for call in calls(guarded):
        if not call.parameters - VALUES.keys():
            continue
        for theirs, nobodys in (("secret", "absent"), (f"sha256:{secret.digest}", "sha256:" + "0" * 64)):
            one = await ask(guarded, call.method, call.filled(theirs), stranger)
            other = await ask(guarded, call.method, call.filled(nobodys), stranger)
            assert (one[0], one[1].replace(theirs.encode(), nobodys.encode())) == other[:2], (call, theirs)
    assert registry.current("secret", "acme") == secret
