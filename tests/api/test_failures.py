"""What a caller sees when the engine refuses or fails, before and after the first token."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.errors import StoreUnavailable
from server.engine.request import FinishReason, GenerationRequest, StepOutput
from server.errors import ContextTooLong, EngineFailure, InvalidRequest, ModelOutputInvalid, NotReady, Overloaded
from tests.api.asgi import Call, until
from tests.api.events import events, openai_error
from tests.api.fake_engine import FIRST_BYTE, FakeEngine
from tests.api.test_disconnect import Slow

Client = httpx.AsyncClient
PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("error", "status", "code", "header", "value"),
    [
        (Overloaded("full"), 503, "overloaded", "retry-after", "1"),
        (NotReady("draining"), 503, "not_ready", "retry-after", "2"),
        (StoreUnavailable("no bucket", code="store_not_found"), 503, "store_not_found", "retry-after", "2"),
        (StoreUnavailable("no entry", code="store_denied"), 503, "store_denied", "retry-after", "2"),
        (ContextTooLong("long"), 400, "context_length_exceeded", "retry-after", None),
        (InvalidRequest("bad"), 400, "invalid_parameter", "x-should-retry", None),
        (RuntimeError("secret detail"), 500, "internal_error", "x-should-retry", "false"),
    ],
)
async def test_refusals_by_the_engine(
    client: Client, engine: FakeEngine, error: Exception, status: int, code: str, header: str, value: str | None
) -> None:
    engine.refuse = error
    for streamed in (False, True):
        answer = await client.post(PATH, json={"prompt": "a", "stream": streamed})
        assert "secret" not in str(openai_error(answer, status, code))
        assert answer.headers.get(header) == value
        assert answer.headers["x-request-id"]
    assert not engine.open


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineFailure("lost"), 500, "engine_failure"),
        (ModelOutputInvalid("NaN"), 500, "model_output_invalid"),
        (None, 500, "engine_failure"),
    ],
)
async def test_failures_before_the_first_token_get_their_status(
    client: Client, engine: FakeEngine, error: Any, status: int, code: str
) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(finish_reason=FinishReason.ERROR, error=error)

    engine.script = script
    for streamed in (False, True):
        openai_error(await client.post(PATH, json={"prompt": "a", "stream": streamed}), status, code)
    assert not engine.open


async def test_a_failure_within_a_stream_is_its_last_event(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(FIRST_BYTE + 97, "a", prompt=engine.prompt_output(request))
        yield StepOutput(finish_reason=FinishReason.ERROR, error=ModelOutputInvalid("NaN logits"))

    engine.script = script
    answer = await client.post(PATH, json={"prompt": "a", "stream": True})
    first, last = events(answer.content, done=False)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "model_output_invalid"
    assert not engine.open


async def test_an_unforeseen_failure_within_a_stream_says_nothing_of_itself(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(FIRST_BYTE + 97, "a", prompt=engine.prompt_output(request))
        raise RuntimeError("secret detail")

    engine.script = script
    answer = await client.post(PATH, json={"prompt": "a", "stream": True})
    assert events(answer.content, done=False)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


async def test_a_stream_that_just_stops_is_a_failure(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(FIRST_BYTE + 97, "a", prompt=engine.prompt_output(request))

    engine.script = script
    openai_error(await client.post(PATH, json={"prompt": "a"}), 500, "engine_failure")


async def test_an_abort_by_the_server_is_no_answer(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(finish_reason=FinishReason.ABORT)

    engine.script = script
    answer = await client.post(PATH, json={"prompt": "a"})
    openai_error(answer, 503, "request_aborted")
    assert answer.headers["retry-after"] == "2"


async def test_room_is_asked_for_all_before_any_is_submitted(client: Client, engine: FakeEngine) -> None:
    engine.capacity = 3
    openai_error(await client.post(PATH, json={"prompt": ["a", "b"], "n": 2}), 503, "overloaded")
    assert not engine.streams


async def test_a_refusal_of_one_aborts_those_before_it(client: Client, engine: FakeEngine) -> None:
    engine.refuse, engine.refuse_after = ContextTooLong("too long"), 2
    openai_error(await client.post(PATH, json={"prompt": "a", "n": 3}), 400, "context_length_exceeded")
    assert len(engine.streams) == 2
    assert all(each.aborted for each in engine.streams)
    assert not engine.open


async def test_a_failure_of_one_aborts_the_others(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        if request.sampling.seed == 1:
            yield StepOutput(finish_reason=FinishReason.ERROR, error=EngineFailure("lost"))
        while True:
            yield StepOutput(FIRST_BYTE + 97, "a")

    engine.script = script
    openai_error(await client.post(PATH, json={"prompt": "a", "n": 3, "seed": 0}), 500, "engine_failure")
    assert not engine.open


async def test_a_server_that_stops_says_so_in_the_stream(
    api: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(engine, 1)
    async with Call(api, "POST", PATH, body={"prompt": "a", "stream": True}) as call:
        first = await call.read() or b""
        await slow.waiting.wait()
        assert not await call.stop(), "an end as ordered is no exception of the application"
        found = events(first + await call.whole(), done=False)
    assert found[-1]["error"]["code"] == "request_aborted"
    assert not engine.open
    assert [record.exc_info for record in caplog.records if record.getMessage() == "request_cut"] == [None]


async def test_a_server_that_stops_answers_who_waits(api: FastAPI, engine: FakeEngine) -> None:
    slow = Slow(engine, 1)
    async with Call(api, "POST", PATH, body={"prompt": "a"}) as call:
        await slow.waiting.wait()
        await call.stop()
        assert b"request_aborted" in await call.whole()
        assert call.status == 503
        assert call.headers["retry-after"] == "2"
    await until(lambda: not engine.open)
