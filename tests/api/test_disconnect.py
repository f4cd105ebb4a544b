"""Clients that leave: whatever was asked of the engine is released, at every moment of a request."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.engine.request import GenerationRequest, StepOutput
from server.metrics import Metrics
from tests.api.asgi import Call, until
from tests.api.fake_engine import FIRST_BYTE, FakeEngine, FakeStream

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "n": 3},
    "/generate": {"inputs": "hi"},
    "/": {"inputs": "hi"},
}


class Slow:
    """Gives `tokens` tokens, then waits for ever; `waiting` is set when a request has come that far."""

    def __init__(self, engine: FakeEngine, tokens: int) -> None:
        self.waiting = asyncio.Event()
        self._engine = engine
        self._tokens = tokens
        engine.script = self

    async def __call__(self, request: GenerationRequest) -> AsyncIterator[StepOutput]:
        for _ in range(self._tokens):
            yield StepOutput(FIRST_BYTE + 97, "a", -1.0, prompt=self._engine.prompt_output(request))
        self.waiting.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", REQUESTS)
async def test_a_client_that_leaves_frees_everything(
    api: FastAPI, engine: FakeEngine, path: str, streamed: bool, tokens: int
) -> None:
    slow = Slow(engine, tokens)
    async with Call(api, "POST", path, body={**REQUESTS[path], "stream": streamed}) as call:
        await slow.waiting.wait()
        assert engine.open
        if streamed and tokens:
            assert await call.read()
    assert engine.streams
    assert not engine.open
    assert all(stream.aborted for stream in engine.streams)


async def test_a_client_that_leaves_while_requests_are_submitted(api: FastAPI, engine: FakeEngine) -> None:
    stuck, submit = asyncio.Event(), engine.submit

    async def slow_submit(request: GenerationRequest) -> FakeStream:
        if engine.streams:
            stuck.set()
            await asyncio.Event().wait()
        return await submit(request)

    engine.submit = slow_submit  # type: ignore[method-assign]
    async with Call(api, "POST", "/v1/completions", body={"prompt": "a", "n": 2}):
        await stuck.wait()
    assert len(engine.streams) == 1
    assert not engine.open


async def test_a_write_that_fails_ends_the_stream(api: FastAPI, engine: FakeEngine) -> None:
    go = asyncio.Event()

    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(FIRST_BYTE + 97, "a", -1.0, prompt=engine.prompt_output(request))
        await go.wait()
        while True:
            yield StepOutput(FIRST_BYTE + 97, "a", -1.0)

    engine.script = script
    async with Call(api, "POST", "/generate_stream", body={"inputs": "a"}) as call:
        assert await call.read()
        call.broken = True  # writing fails before any sign of the disconnect is read
        go.set()
        await until(lambda: not engine.open)
    assert not engine.open


async def test_a_stream_waits_for_a_slow_reader(api: FastAPI, engine: FakeEngine) -> None:
    """The engine's outputs are not drawn faster than the client takes them."""
    drawn, may_send = 0, asyncio.Event()

    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        nonlocal drawn
        while True:
            drawn += 1
            yield StepOutput(FIRST_BYTE + 97, "a", -1.0, prompt=engine.prompt_output(request))
            await asyncio.sleep(0)

    engine.script = script
    call = Call(api, "POST", "/generate_stream", body={"inputs": "a"})
    take = call._take

    async def slow_take(message: Any) -> None:
        await may_send.wait()
        await take(message)

    call._take = slow_take  # type: ignore[method-assign]
    async with call:
        for _ in range(200):
            await asyncio.sleep(0)
        assert 0 < drawn < 10
        may_send.set()
        assert await call.read()
    assert not engine.open


async def test_a_reader_that_stalls_and_then_leaves(api: FastAPI, engine: FakeEngine) -> None:
    stalled = asyncio.Event()
    Slow(engine, 1)
    call = Call(api, "POST", "/generate_stream", body={"inputs": "a"})

    async def never(message: Any) -> None:
        stalled.set()
        await asyncio.Event().wait()

    call._take = never  # type: ignore[method-assign]
    async with call:
        await stalled.wait()
        assert engine.open
    assert not engine.open


async def test_aborts_are_counted(api: FastAPI, engine: FakeEngine, services: Any) -> None:
    slow = Slow(engine, 1)
    async with Call(api, "POST", "/generate", body={"inputs": "a"}):
        await slow.waiting.wait()
    metrics: Metrics = services.metrics
    text = metrics.render().decode()
    assert 'polyrank_generations_finished_total{endpoint="generate",reason="abort"} 1.0' in text
    assert 'polyrank_rejections_total{code="client_disconnected"} 1.0' in text
    assert 'status="499"' in text


async def test_leaving_in_the_middle_of_a_body(api: FastAPI, engine: FakeEngine) -> None:
    call = Call(api, "POST", "/generate")
    call.send(b'{"inputs": ')
    async with call:
        await asyncio.sleep(0)
    assert not engine.streams


async def test_leaving_in_the_middle_of_an_upload(api: FastAPI, services: Any) -> None:
    staging: Path = services.settings.staging
    call = Call(api, "PUT", "/adapters/new", headers={"content-type": "multipart/form-data; boundary=b"})
    call.send(b'--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\n' + b"x" * (1 << 20))
    call.send(b"more")
    async with call:
        await until(lambda: any(path.stat().st_size for path in staging.iterdir()))
    assert not os.listdir(staging)
    assert ("public", "new") not in services.adapters.names
