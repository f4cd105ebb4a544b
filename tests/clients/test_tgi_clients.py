"""Hugging Face's, TGI's and LoRAX's clients."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import huggingface_hub
import lorax
import lorax.errors
import pytest
import text_generation
import text_generation.errors
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from tests.clients.live import LiveServer

pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")  # old clients, newer pydantic


@pytest.fixture(autouse=True)
def loopback_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` switches the hub's downloads off, and the library's own client for servers with them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(live_server: LiveServer) -> Iterator[InferenceClient]:
    with InferenceClient(model=live_server.base_url, token="none") as client:
        yield client


@pytest.fixture
async def asynchronous_hub(live_server: LiveServer) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(model=live_server.base_url, token="none") as client:
        yield client


def test_hub_text(hub: InferenceClient, live_server: LiveServer) -> None:
    plain = hub.text_generation("Hello", max_new_tokens=8)
    adapted = hub.text_generation("Hello", max_new_tokens=8, adapter_id=live_server.adapters[0])
    assert plain
    assert adapted
    assert plain != adapted


def test_hub_details(hub: InferenceClient, live_server: LiveServer) -> None:
    answer = hub.text_generation(
        "Hello",
        details=True,
        decoder_input_details=True,
        max_new_tokens=4,
        top_n_tokens=2,
        adapter_id=live_server.adapters[0],
        do_sample=True,
        seed=4,
    )
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens) <= 4
    assert answer.details.prefill
    assert answer.details.seed == 4
    assert answer.details.top_tokens is not None


def test_hub_stream(hub: InferenceClient, live_server: LiveServer) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 8, "adapter_id": live_server.adapters[0]}
    whole = hub.text_generation("Hello", **asked)
    assert "".join(hub.text_generation("Hello", stream=True, **asked)) == whole
    events = list(hub.text_generation("Hello", stream=True, details=True, **asked))
    assert events[-1].generated_text == whole
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == len(events)
    assert events[-1].details.input_length > 0


async def test_hub_asynchronous(asynchronous_hub: AsyncInferenceClient, live_server: LiveServer) -> None:
    assert await asynchronous_hub.text_generation("Hello", max_new_tokens=4)
    stream = await asynchronous_hub.text_generation("Hello", max_new_tokens=4, stream=True)
    assert [piece async for piece in stream]


def test_hub_chat(hub: InferenceClient, live_server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = hub.chat_completion(messages, max_tokens=8)
    assert answer.choices[0].message.content
    named = InferenceClient(base_url=live_server.base_url, api_key="none")
    assert named.chat_completion(messages, max_tokens=8, model=live_server.adapters[0]).model == live_server.adapters[0]
    pieces = list(hub.chat_completion(messages, max_tokens=8, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)


def test_hub_errors(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        hub.text_generation("Hello", max_new_tokens=-1)
    with pytest.raises(Exception, match=r"404|does not exist"):
        hub.text_generation("Hello", adapter_id="nobody")


def test_hub_health(live_server: LiveServer) -> None:
    hub = InferenceClient(model=live_server.base_url, provider="hf-inference", api_key="none")
    assert hub.health_check()
    assert hub.get_endpoint_info()["model_id"] == live_server.model


def test_tgi(live_server: LiveServer) -> None:
    client = text_generation.Client(live_server.base_url)
    answer = client.generate("Hello", max_new_tokens=4, decoder_input_details=True, top_n_tokens=1)
    assert answer.generated_text
    assert answer.details.generated_tokens == len(answer.details.tokens)
    best = client.generate("Hello", max_new_tokens=4, do_sample=True, best_of=2)
    assert best.details.best_of_sequences is not None
    assert best.details.seed is not None
    events = list(client.generate_stream("Hello", max_new_tokens=4))
    assert "".join(event.token.text for event in events) == answer.generated_text
    assert events[-1].generated_text == answer.generated_text


def test_tgi_chat(live_server: LiveServer) -> None:
    client = text_generation.Client(live_server.base_url)
    messages = [text_generation.types.Message(role="user", content="Hello")]
    answer = client.chat(messages, max_tokens=4)
    assert answer.choices[0].message.content
    # Its stream of a chat cannot be read from any server: it takes `[DONE]` for JSON.


async def test_tgi_asynchronous(live_server: LiveServer) -> None:
    client = text_generation.AsyncClient(live_server.base_url)
    assert (await client.generate("Hello", max_new_tokens=4)).generated_text
    assert [event async for event in client.generate_stream("Hello", max_new_tokens=4)][-1].generated_text


def test_tgi_errors(live_server: LiveServer) -> None:
    client = text_generation.Client(live_server.base_url)
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        client.generate("Hello", max_new_tokens=2**40)


def test_lorax(live_server: LiveServer) -> None:
    client = lorax.Client(live_server.base_url)
    plain = client.generate("Hello", max_new_tokens=8)
    adapted = client.generate("Hello", max_new_tokens=8, adapter_id=live_server.adapters[0], adapter_source="local")
    assert plain.generated_text != adapted.generated_text
    assert adapted.details is not None
    assert adapted.details.prompt_tokens > 0
    events = list(client.generate_stream("Hello", max_new_tokens=8, adapter_id=live_server.adapters[0]))
    assert events[-1].generated_text == adapted.generated_text
    assert events[-1].details is not None


def test_lorax_merged(live_server: LiveServer) -> None:
    client = lorax.Client(live_server.base_url)
    merged = lorax.MergedAdapters(
        ids=list(live_server.adapters), weights=[0.5, 0.5], merge_strategy="linear", density=0.5
    )
    answer = client.generate("Hello", max_new_tokens=8, merged_adapters=merged, return_k_alternatives=2)
    assert answer.details is not None
    assert len(answer.details.tokens[0].alternative_tokens or []) == 2


def test_lorax_errors(live_server: LiveServer) -> None:
    client = lorax.Client(live_server.base_url)
    with pytest.raises(lorax.errors.NotFoundError, match="nobody"):
        client.generate("Hello", adapter_id="nobody")
    with pytest.raises(lorax.errors.ValidationError, match="max_new_tokens"):
        client.generate("Hello", max_new_tokens=2**40)


async def test_lorax_asynchronous(live_server: LiveServer) -> None:
    client = lorax.AsyncClient(live_server.base_url)
    answer = await client.generate("Hello", max_new_tokens=4, adapter_id=live_server.adapters[1])
    assert answer.generated_text
    events = [event async for event in client.generate_stream("Hello", max_new_tokens=4)]
    assert events[-1].generated_text
