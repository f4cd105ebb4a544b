"""openai's client, which checks every answer against its own types."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.live import LiveServer

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    base_url = f"{live_server.base_url}/v1"
    with OpenAI(base_url=base_url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
async def asynchronous(live_server: LiveServer) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"{live_server.base_url}/v1"
    async with AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_models(client: OpenAI, live_server: LiveServer) -> None:
    models = {model.id for model in client.models.list()}
    assert {live_server.model, *live_server.adapters} <= models
    assert client.models.retrieve(live_server.adapters[0]).id == live_server.adapters[0]


def test_completion(client: OpenAI, live_server: LiveServer) -> None:
    answer = client.completions.create(
        model=live_server.adapters[0], prompt="Hello", max_tokens=8, logprobs=2, temperature=0, seed=1
    )
    choice = answer.choices[0]
    assert choice.text
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert answer.usage is not None
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens
    assert answer.model == live_server.adapters[0]


@pytest.fixture
def lenient(live_server: LiveServer) -> Iterator[OpenAI]:
    """For answers that openai's own types do not allow, though openai's server gives them: null in their places."""
    with OpenAI(base_url=f"{live_server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_echo_scores_the_prompt(lenient: OpenAI, live_server: LiveServer) -> None:
    answer = lenient.completions.create(
        model=live_server.model, prompt=[5, 6, 7], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 4
    known = [score is not None for score in logprobs.token_logprobs]
    assert known == [False, True, True, True]


def test_prompt_lists(client: OpenAI, live_server: LiveServer) -> None:
    answer = client.completions.create(model=live_server.model, prompt=["One", "Two"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_chat(client: OpenAI, live_server: LiveServer) -> None:
    answer = client.chat.completions.create(
        model=live_server.adapters[0],
        messages=MESSAGES,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=2,
        n=2,
        seed=3,
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.message.content
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_chat_stream(client: OpenAI, live_server: LiveServer) -> None:
    asked = {"model": live_server.model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    pieces = list(stream)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completion_stream(lenient: OpenAI, live_server: LiveServer) -> None:
    pieces = list(lenient.completions.create(model=live_server.adapters[1], prompt="Hello", max_tokens=6, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")


async def test_asynchronous(asynchronous: AsyncOpenAI, live_server: LiveServer) -> None:
    answer = await asynchronous.chat.completions.create(model=live_server.model, messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content
    stream = await asynchronous.chat.completions.create(
        model=live_server.model, messages=MESSAGES, max_tokens=4, stream=True
    )
    text = ""
    async for piece in stream:
        text += piece.choices[0].delta.content or ""
    assert text


async def test_leaving_a_stream_early(asynchronous: AsyncOpenAI, live_server: LiveServer) -> None:
    for _ in range(3):
        stream = await asynchronous.chat.completions.create(
            model=live_server.model, messages=MESSAGES, max_tokens=500, extra_body={"ignore_eos": True}, stream=True
        )
        async for _piece in stream:
            break
        await stream.close()
    assert (await asynchronous.models.list()).data


def test_unknown_models(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "The model `nobody` does not exist." in caught.value.message
    assert caught.value.request_id


def test_bad_requests(client: OpenAI, live_server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=live_server.model, prompt="a", n=100)
    assert caught.value.code == "invalid_parameter"


def test_the_adapter_is_told_in_headers(client: OpenAI, live_server: LiveServer) -> None:
    raw = client.completions.with_raw_response.create(model=live_server.adapters[0], prompt="a", max_tokens=1)
    assert raw.headers["x-adapter"] == f"{live_server.adapters[0]}@1"
    assert len(raw.headers["x-adapter-digest"]) == 64
