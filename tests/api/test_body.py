"""JSON bodies that are no good, and what surrounds every answer."""

import asyncio
import logging
import re
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.application import create_api
from server.api.services import Services
from server.metrics import Metrics
from tests.api.asgi import Call
from tests.api.events import openai_error, tgi_error
from tests.api.fake_engine import FakeEngine

Client = httpx.AsyncClient
JSON = {"content-type": "application/json"}

BAD = {
    "empty": b"",
    "cut": b'{"prompt": "a"',
    "list": b'["prompt"]',
    "text": b'"prompt"',
    "number": b"1",
    "null": b"null",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "many lists": b'{"prompt": [' + b"[]," * 20_000 + b"[]]}",
    "many numbers": b'{"prompt": [' + b"1," * 200_000 + b"1]}",
    "many strings": b'{"other": [' + b'"",' * 200_001 + b"1]}",
    "bad utf-8": b'{"prompt": "\xff"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "half a pair": b'{"prompt": "\\ud83d\\u0041"}',
    "control character": b'{"prompt": "\x01"}',
    "huge integer": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "trailing": b'{"prompt": "a"} {"prompt": "b"}',
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/tokenize", "/v1/load_lora_adapter"])
async def test_bodies_that_are_no_json_object(client: Client, engine: FakeEngine, path: str, name: str) -> None:
    answer = await client.post(path, content=BAD[name], headers=JSON)
    if path == "/generate":
        tgi_error(answer, 400, "validation")
    else:
        openai_error(answer, 400, "invalid_json")
    assert not engine.streams


async def test_a_pair_of_surrogates_is_a_character(client: Client) -> None:
    answer = await client.post("/generate", content=b'{"inputs": "\\ud83d\\ude00"}', headers=JSON)
    assert answer.json()["generated_text"] == "😀"


async def test_nul_and_control_characters_are_text_when_escaped(client: Client) -> None:
    answer = await client.post("/generate", json={"inputs": "a\0\x1b\u202e"})
    assert answer.json()["generated_text"] == "a\0\x1b\u202e"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
async def test_only_json_is_read(client: Client, kind: str) -> None:
    """A web page may send text/plain to any address without asking: so that is never read as JSON."""
    answer = await client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
    openai_error(answer, 415, "unsupported_media_type")


async def test_json_by_other_names(client: Client) -> None:
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        answer = await client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 200


async def test_a_declared_size_over_the_limit_is_refused_unread(api: FastAPI) -> None:
    async with Call(api, "POST", "/generate", headers={"content-length": str(1 << 40)}) as call:
        assert b"larger than 1048576 bytes" in await call.whole()
        assert call.status == 413
        assert call.headers["connection"] == "close"


async def test_a_counted_size_over_the_limit_is_refused_when_it_is_reached(api: FastAPI) -> None:
    call = Call(api, "POST", "/v1/completions", headers={"transfer-encoding": "chunked"})
    call.send(b'{"prompt": "' + b"x" * (1 << 20))  # and more would come
    async with call:
        assert b"body_too_large" in await call.whole()
        assert call.status == 413


async def test_a_body_that_stops_coming(services: Services) -> None:
    api = create_api(
        replace(services, metrics=Metrics(), settings=replace(services.settings, upload_idle_seconds=0.01))
    )
    call = Call(api, "POST", "/v1/completions")
    call.send(b'{"prompt": "')
    async with call:
        assert b"upload_incomplete" in await call.whole()
        assert call.status == 408


REPEATED = {
    "adapter": b'{"prompt": "a", "adapter": "legal", "adapter": "poet"}',
    "seed": b'{"prompt": "a", "parameters": {"seed": 1, "se\\u0065d": 1}}',
    "name": b'{"prompt": "\\":\\\\", "adapters": [{"name": "legal", "name": "poet"}]}',
}


@pytest.mark.parametrize("key", REPEATED)
async def test_a_key_given_twice_is_refused(client: Client, engine: FakeEngine, key: str) -> None:
    """A parser keeps the last, and nobody is told which adapter answered."""
    answer = await client.post("/v1/completions", content=REPEATED[key], headers=JSON)
    error = openai_error(answer, 400, "invalid_json")
    assert f"`{key}` twice" in error["message"]
    assert error["param"] == key
    answer = await client.post("/generate", content=REPEATED[key].replace(b"prompt", b"inputs"), headers=JSON)
    assert f"`{key}` twice" in tgi_error(answer, 400, "validation")
    assert not engine.streams


async def test_what_looks_like_keys_inside_texts_is_text(client: Client) -> None:
    text = '{"a": 1, "a": 2} \\ \\\\" [{:,' * 1000
    answer = await client.post("/v1/completions", json={"prompt": text, "logit_bias": {"1": 1}, "max_tokens": 1})
    assert "context" in openai_error(answer, 400, "context_length_exceeded")["message"]
    text = text[:1000]
    answer = await client.post("/generate", json={"inputs": text, "parameters": {"max_new_tokens": 1000}})
    assert answer.json()["generated_text"] == text


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.Z_9", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)],
)
async def test_request_ids(client: Client, sent: str, kept: bool) -> None:
    answer = await client.get("/health", headers=[(b"x-request-id", sent.encode("latin-1"))])
    if kept:
        assert answer.headers["x-request-id"] == sent
    else:
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_every_error_has_a_request_id(client: Client, engine: FakeEngine) -> None:
    engine.refuse = RuntimeError("boom")
    answers = [
        await client.get("/nowhere"),
        await client.get("/v1/completions"),
        await client.post("/v1/completions", json={"prompt": "a"}),
        await client.post("/v1/completions", content=b"{", headers=JSON),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 500, 400]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


async def test_an_unforeseen_error_is_logged_and_not_told(
    client: Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuse = RuntimeError("the secret path /etc/shadow")
    with caplog.at_level(logging.ERROR, "server.api.context"):
        answer = await client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "find-me"})
    openai_error(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    [failed] = [record for record in caplog.records if record.message == "request_failed"]
    assert failed.__dict__["request_id"] == "find-me"
    assert "secret" in caplog.text


async def test_unknown_paths_and_methods(client: Client) -> None:
    openai_error(await client.get("/v2/models"), 404, "not_found")
    answer = await client.get("/v1/completions")
    openai_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    tgi_error(await client.get("/generate"), 405, "method_not_allowed")
    assert (await client.get("/health/")).status_code == 404


async def test_requests_are_counted_by_route_and_code(client: Client, services: Any) -> None:
    await client.post("/generate", json={"inputs": 1})
    await client.get("/adapters/legal")
    await client.get("/nowhere/else")
    text = services.metrics.render().decode()
    assert 'polyrank_http_requests_total{method="POST",route="/generate",status="422"} 1.0' in text
    assert 'polyrank_http_requests_total{method="GET",route="/adapters/{reference}",status="200"} 1.0' in text
    assert 'route="unmatched",status="404"' in text
    assert 'polyrank_rejections_total{code="invalid_parameter"} 1.0' in text
    assert "nowhere" not in text


async def test_lifespan_and_websockets_pass(api: FastAPI) -> None:
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    for kind in ("lifespan.startup", "lifespan.shutdown"):
        events.put_nowait({"type": kind})
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await api({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, events.get, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
