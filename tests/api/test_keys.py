"""How keys are sent and refused, in whose place they act, and what the record of changes says of it."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.access.key import SCOPES
from server.api.application import create_api
from server.api.services import Services
from server.metrics import Metrics
from tests.api.events import openai_error, tgi_error
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import CONFIG, FakeRegistry
from tests.support.api_keys import YESTERDAY, ApiKeys, bearer

Client = httpx.AsyncClient
TENANT_SCOPES = SCOPES - {"admin"}
MERGE = {"name": "new", "method": "lego", "sources": [{"adapter": "legal"}, {"adapter": "poet"}]}


class Record:
    """What was written."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, fields: Mapping[str, Any]) -> None:
        self.lines.append(dict(fields))


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys()


@pytest.fixture
def audit() -> Record:
    return Record()


@pytest.fixture
async def guarded(services: Services, keys: ApiKeys, audit: Record) -> AsyncIterator[Client]:
    api = create_api(replace(services, keys=keys, audit=audit, metrics=Metrics()))
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with Client(transport=transport, base_url="http://polyrank") as client:
        yield client


def upload(weights: bytes = b"weights") -> dict[str, Any]:
    return {"files": {"config": CONFIG, "weights": weights}}


async def test_a_key_comes_in_either_header(guarded: Client, keys: ApiKeys) -> None:
    key = keys.make("adapters:read")
    for headers in (
        bearer(key),
        {"Authorization": f"bearer {key}"},
        {"Authorization": f"  BEARER   {key} "},
        {"X-API-Key": key},
        {"X-API-Key": key, "Authorization": f"Bearer {key}"},
        {"X-API-Key": key, "Authorization": "Basic cHJveHk6cHJveHk="},  # a proxy's own
    ):
        assert (await guarded.get("/adapters", headers=headers)).status_code == 200, headers


async def test_refusals_have_the_shape_of_their_route(guarded: Client, keys: ApiKeys) -> None:
    key = keys.make("metrics")
    for headers, status, code in (
        ({}, 401, "missing_api_key"),
        ({"Authorization": "Bearer "}, 401, "missing_api_key"),
        ({"Authorization": "Basic x"}, 401, "missing_api_key"),
        ({"Authorization": key}, 401, "missing_api_key"),
        (bearer("none"), 401, "invalid_api_key"),
        ({"X-API-Key": key, **bearer(keys.make())}, 401, "invalid_api_key"),
        (bearer(key), 403, "missing_scope"),
    ):
        answer = await guarded.post("/v1/chat/completions", json={}, headers=headers)
        error = openai_error(answer, status, code)
        assert key not in error["message"]
        assert ("www-authenticate" in answer.headers) is (status == 401)
        assert "retry-after" not in answer.headers
        assert tgi_error(await guarded.post("/generate", json={}, headers=headers), status, code)
    assert "`generate`" in (await guarded.post("/generate", json={}, headers=bearer(key))).text


async def test_two_headers_of_one_name_do_not_help(guarded: Client, keys: ApiKeys) -> None:
    right, wrong = keys.make(), "pr_aaaaaaaa_" + "x" * 43
    for first, second in ((right, wrong), (wrong, right)):
        for name in ("Authorization", "X-API-Key"):
            words = "Bearer " if name == "Authorization" else ""
            answer = await guarded.get("/adapters", headers=[(name, words + first), (name, words + second)])
            openai_error(answer, 401, "invalid_api_key")


async def test_every_reason_has_one_body(guarded: Client, keys: ApiKeys) -> None:
    right = keys.make()
    bad = (keys.make(revoked=YESTERDAY), keys.make(expires=YESTERDAY), right[:-1], "x")
    assert len({(await guarded.get("/adapters", headers=bearer(each))).text for each in bad}) == 1


async def test_without_keys_everybody_is_the_public_tenant(client: Client, registry: FakeRegistry) -> None:
    """Clients that must send some key are let in with it."""
    for headers in ({}, bearer("none")):
        assert (await client.get("/adapters", headers=headers)).status_code == 200
    assert (await client.put("/adapters/new", **upload())).status_code == 201
    assert registry.current("new") is not None


async def test_no_key_is_in_a_log(guarded: Client, keys: ApiKeys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, gone = keys.make(), keys.make(revoked=YESTERDAY)
    for each in (key, gone, key[:-1]):
        await guarded.get("/adapters", headers=bearer(each))
        await guarded.post("/generate", json={"inputs": 1}, headers={"X-API-Key": each})
    told = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert key[12:-1] not in told
    assert gone[12:] not in told
    assert f"'key': '{key[:11]}'" in told


async def test_the_schema_says_how_to_send_a_key(guarded: Client, client: Client) -> None:
    schema = (await guarded.get("/openapi.json")).json()
    assert schema["security"] == [{"key": []}, {"header": []}]
    assert schema["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    operations = {path: found["get"] for path, found in schema["paths"].items() if "get" in found}
    assert {path for path, found in operations.items() if found.get("security") == []} == {"/health", "/ready"}
    assert "security" not in (await client.get("/openapi.json")).json()


# --- tenants


async def test_a_tenant_writes_its_own_and_reads_the_public_ones(
    guarded: Client, keys: ApiKeys, registry: FakeRegistry, engine: FakeEngine
) -> None:
    acme, globex = (bearer(keys.make(*TENANT_SCOPES, tenant=tenant)) for tenant in ("acme", "globex"))
    made = await guarded.put("/adapters/legal", headers=acme, **upload(b"acme"))
    assert (made.status_code, made.json()["tenant"], made.json()["version"]) == (201, "acme", 1)
    for headers, digest in ((acme, made.json()["digest"]), (globex, registry.info("legal").digest)):
        assert (await guarded.get("/adapters/legal", headers=headers)).json()["digest"] == digest
        answer = await guarded.post("/generate?adapter=legal", json={"inputs": "a"}, headers=headers)
        assert answer.headers["x-adapter-digest"] == digest
        assert engine.last.adapters[0].digest == digest
        listed = (await guarded.get("/adapters", headers=headers)).json()["adapters"]
        assert {info["name"]: info["digest"] for info in listed}["legal"] == digest
        models = (await guarded.get("/v1/models", headers=headers)).json()["data"]
        assert [card["id"] for card in models].count("legal") == 1
        assert digest in str(models)
        assert (await guarded.get("/v1/models/legal", headers=headers)).json()["root"].endswith(digest)
    assert [request.tenant for request in engine.requests] == ["acme", "globex"]  # the salt of the prefix cache


async def test_public_names_take_a_public_key_or_an_admin_in_its_place(
    guarded: Client, keys: ApiKeys, registry: FakeRegistry
) -> None:
    acme = bearer(keys.make(*TENANT_SCOPES, tenant="acme"))
    openai_error(await guarded.delete("/adapters/legal", headers=acme), 403, "public_adapter")
    rollback = await guarded.post("/adapters/legal/rollback", json={"version": 1}, headers=acme)
    openai_error(rollback, 403, "public_adapter")
    for other in ("public", "globex", "no-such"):
        refused = await guarded.delete("/adapters/legal", headers={**acme, "X-Tenant": other})
        assert openai_error(refused, 403, "missing_scope")["param"] == "X-Tenant"
    assert (await guarded.get("/adapters/legal", headers={**acme, "X-Tenant": "acme"})).status_code == 200
    admin = bearer(keys.make("admin", tenant="acme"))
    made = await guarded.put("/adapters/more", headers={**admin, "X-Tenant": "globex"}, **upload())
    assert made.json()["tenant"] == "globex"
    assert registry.current("more", "globex") is not None
    twice = await guarded.get("/adapters", headers=[*admin.items(), ("X-Tenant", "acme"), ("X-Tenant", "globex")])
    assert openai_error(twice, 400, "invalid_parameter")["param"] == "X-Tenant"
    bad = await guarded.get("/adapters", headers={**admin, "X-Tenant": "../x"})
    assert openai_error(bad, 400, "invalid_parameter")["param"] == "X-Tenant"
    assert (await guarded.delete("/adapters/legal", headers={**admin, "X-Tenant": "public"})).status_code == 204
    public = bearer(keys.make("adapters:write"))
    assert (await guarded.delete("/adapters/poet", headers=public)).status_code == 204


def strange(theirs: str, digest: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that name an adapter elsewhere than in the path."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name in (theirs, f"{theirs}@1", f"base:{theirs}", f"sha256:{digest}"):
        completion = {"model": name, "prompt": "a"}
        chat = {"model": name, "messages": [{"role": "user", "content": "a"}]}
        found += [
            ("POST", f"/generate?adapter={name}", {"json": {"inputs": "a"}}),
            ("POST", "/generate", {"json": {"inputs": "a"}, "headers": {"X-Adapter": name}}),
            ("POST", "/generate", {"json": {"inputs": "a", "parameters": {"adapter_id": name}}}),
            ("POST", "/", {"json": {"inputs": "a", "adapter": name}}),
            ("POST", "/generate_stream", {"json": {"inputs": "a", "adapters": [{"name": name, "weight": 1.0}]}}),
            ("POST", "/v1/completions", {"json": completion}),
            ("POST", "/v1/chat/completions", {"json": chat}),
            ("POST", "/v1/chat/completions", {"json": {**chat, "stream": True}}),
            ("POST", "/tokenize", {"json": completion}),
            ("POST", "/detokenize", {"json": {"model": name, "tokens": [1]}}),
            ("POST", "/merge", {"json": {**MERGE, "sources": [{"adapter": "legal"}, {"adapter": name}]}}),
            ("POST", "/compress", {"json": {"adapters": ["legal", name], "method": "jd_full", "rank": 2}}),
        ]
    return found


async def test_no_body_reaches_another_tenants_adapter(
    guarded: Client, keys: ApiKeys, registry: FakeRegistry, engine: FakeEngine
) -> None:
    """Each answer is that for a name which nobody has."""
    secret = registry.put("secret", tenant="acme").digest
    stranger = bearer(keys.make(*TENANT_SCOPES, tenant="globex"))
    pairs = zip(strange("secret", secret), strange("absent", "0" * 64), strict=True)
    for (method, path, how), (_, nowhere, nothing) in pairs:
        answers = []
        for url, options in ((path, how), (nowhere, nothing)):
            headers = {**options.get("headers", {}), **stranger}
            answers.append(await guarded.request(method, url, **{**options, "headers": headers}))
        told = [answer.text.replace("secret", "absent").replace(secret, "0" * 64) for answer in answers]
        assert answers[0].status_code == answers[1].status_code == 404, (path, answers[0].text)
        assert told[0] == told[1], path
        assert "x-adapter" not in answers[0].headers
    assert not engine.streams
    owner = bearer(keys.make(*TENANT_SCOPES, tenant="acme"))
    for method, path, how in strange("secret", secret)[:-1]:
        headers = {**how.get("headers", {}), **owner}
        assert (await guarded.request(method, path, **{**how, "headers": headers})).status_code < 300, path


async def test_jobs_are_their_tenants_own(guarded: Client, keys: ApiKeys, audit: Record) -> None:
    acme, globex = (bearer(keys.make(*TENANT_SCOPES, tenant=tenant)) for tenant in ("acme", "globex"))
    made = await guarded.post("/merge?wait=true", json=MERGE, headers=acme)
    assert (made.status_code, made.json()["tenant"]) == (201, "acme")
    jobs = (await guarded.get("/jobs", headers=acme)).json()["jobs"]
    assert [job["id"] for job in jobs] == [audit.lines[-1]["job"]]
    path = f"/jobs/{jobs[0]['id']}"
    assert (await guarded.get(path, headers=acme)).status_code == 200
    assert (await guarded.get("/jobs", headers=globex)).json()["jobs"] == []
    for method in ("GET", "DELETE"):
        one = await guarded.request(method, path, headers=globex)
        assert one.text == (await guarded.request(method, "/jobs/none", headers=globex)).text
        openai_error(one, 404, "job_not_found")


async def test_equal_names_of_tenants_have_labels_of_their_own(
    services: Services, keys: ApiKeys, registry: FakeRegistry
) -> None:
    metrics = Metrics()
    api = create_api(replace(services, keys=keys, metrics=metrics))
    registry.put("same", b"1", "acme")
    registry.put("same", b"2", "globex")
    registry.put("same", b"3")
    async with Client(transport=httpx.ASGITransport(app=api), base_url="http://polyrank") as client:
        for count, tenant in enumerate(("acme", "globex", "public"), 1):
            for _ in range(count):
                await client.post(
                    "/generate?adapter=same", json={"inputs": "a"}, headers=bearer(keys.make(tenant=tenant))
                )
    found = re.findall(r'polyrank_adapter_requests_total\{adapter="([^"]*)"\} ([0-9.]+)', metrics.render().decode())
    assert dict(found) == {"acme/same": "1.0", "globex/same": "2.0", "same": "3.0"}


# --- the record of changes


async def test_each_change_is_a_line(guarded: Client, keys: ApiKeys, audit: Record, registry: FakeRegistry) -> None:
    writer = keys.make("adapters:write", "adapters:read", "generate", tenant="acme")
    headers = {**bearer(writer), "X-Request-Id": "r-1"}
    made = (await guarded.put("/adapters/new", headers=headers, **upload(b"1"))).json()
    line = audit.lines[-1]
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "request_id": "r-1",
        "key": writer[:11],
        "tenant": "acme",
        "action": "PUT /adapters/{name}",
        "name": "new",
        "version": 1,
        "digest": made["digest"],
        "job": None,
        "status": 201,
        "code": None,
    }
    await guarded.put("/adapters/new?replace=true", headers=headers, **upload(b"2"))
    await guarded.post("/adapters/new/rollback", json={"version": 1}, headers=headers)
    await guarded.post("/adapters/new/warm", headers=headers)
    await guarded.post("/adapters/new/compress", json={}, headers=headers)
    await guarded.post("/merge", json=MERGE, headers=headers)
    await guarded.delete("/adapters/new", headers=headers)
    told = [(each["action"].split("/")[-1], each["name"], each["status"]) for each in audit.lines]
    assert told == [
        ("{name}", "new", 201),
        ("{name}", "new", 201),
        ("rollback", "new", 200),
        ("warm", "new", 200),
        ("compress", "new", 200),
        ("merge", "new", 202),
        ("{name}", "new", 204),
    ]
    assert [each["version"] for each in audit.lines] == [1, 2, 3, 3, 4, None, None]
    assert audit.lines[5]["job"]
    for path in ("/adapters", "/adapters/new", "/v1/models", "/jobs"):
        await guarded.get(path, headers=headers)
    await guarded.post("/generate", json={"inputs": "a prompt"}, headers=headers)
    assert len(audit.lines) == 7
    assert writer[12:] not in str(audit.lines)


async def test_refused_changes_are_lines_too(guarded: Client, keys: ApiKeys, audit: Record) -> None:
    reader, gone = keys.make("adapters:read"), keys.make(revoked=YESTERDAY)
    writer = bearer(keys.make("adapters:write"))
    await guarded.delete("/adapters/legal")
    await guarded.delete("/adapters/legal", headers=bearer(gone))
    await guarded.delete("/adapters/legal", headers=bearer(reader))
    await guarded.delete("/adapters/absent", headers=writer)
    await guarded.post("/merge", content=b"{", headers={**writer, "Content-Type": "application/json"})
    await guarded.put("/adapters/x%0ay", headers=writer, content=b"")
    await guarded.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "../x"}, headers=writer)
    told = [(each["name"], each["key"], each["status"], each["code"]) for each in audit.lines]
    own = writer["Authorization"][7:18]
    assert told == [
        ("legal", None, 401, "missing_api_key"),
        ("legal", gone[:11], 401, "invalid_api_key"),
        ("legal", reader[:11], 403, "missing_scope"),
        ("absent", own, 404, "model_not_found"),
        (None, own, 400, "invalid_json"),
        ("x\ny", own, 415, "unsupported_media_type"),
        (None, own, 403, "missing_scope"),
    ]


async def test_a_change_that_was_cut_off_is_a_line(
    guarded: Client, keys: ApiKeys, audit: Record, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's end cuts the wait for the answer, not the change."""
    began = asyncio.Event()
    real = registry.delete
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any, **options: Any) -> None:
        loop.call_soon_threadsafe(began.set)
        real(*arguments, **options)

    monkeypatch.setattr(registry, "delete", slow)
    call = asyncio.create_task(guarded.delete("/adapters/legal", headers=bearer(keys.make())))
    await began.wait()
    call.cancel()
    openai_error(await call, 503, "request_aborted")
    assert [(each["name"], each["status"]) for each in audit.lines] == [("legal", 503)]
