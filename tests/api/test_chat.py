"""`POST /v1/chat/completions`."""

from typing import Any

import httpx
import pytest

from server.engine.request import Grammar
from tests.api.events import events, openai_error
from tests.api.fake_engine import FakeEngine, logprob_of

Client = httpx.AsyncClient
PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


async def chat(client: Client, **body: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"messages": HELLO, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: Client, **body: Any) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json={"messages": HELLO, "temperature": 0, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return events(answer.content)


async def test_the_template_makes_the_prompt(client: Client, engine: FakeEngine) -> None:
    body = await chat(client, model="legal")
    assert engine.last.prompt == "user:hi\nassistant:"
    assert not engine.last.add_special_tokens
    assert engine.last.sampling.max_tokens is None
    assert body["object"] == "chat.completion"
    assert body["model"] == "legal"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].endswith("user:hi\nassistant:")
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


async def test_parts_roles_and_names(client: Client, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be "},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": None},
    ]
    await chat(client, messages=messages, add_generation_prompt=False)
    assert engine.last.prompt == "system:Be \nuser:ab\nassistant:\n"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "king", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "poem", "text": "x"}]}],
        [{"role": "user", "content": 3}],
        [{"role": "tool", "content": "the template refuses this one"}],
    ],
)
async def test_bad_messages(client: Client, engine: FakeEngine, messages: Any) -> None:
    error = openai_error(await client.post(PATH, json={"messages": messages}), 400, "invalid_parameter")
    assert error["param"].startswith("messages")
    assert not engine.streams


@pytest.mark.parametrize(("kind", "feature"), [("image_url", "images"), ("input_audio", "audio"), ("file", "files")])
async def test_what_is_no_text_is_refused_in_plain_words(
    client: Client, engine: FakeEngine, kind: str, feature: str
) -> None:
    content = [{"type": "text", "text": "look"}, {"type": kind, kind: {"url": "http://x"}}]
    answer = await client.post(PATH, json={"messages": [{"role": "user", "content": content}]})
    error = openai_error(answer, 400, "unsupported_parameter")
    assert error["message"] == f"Not supported: {feature} in messages. Send parts of type `text` only."
    assert not engine.streams


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter"),
        ({"tool_choice": "required"}, "unsupported_parameter"),
        ({"functions": [{}]}, "unsupported_parameter"),
        ({"chat_template": "{{ x }}"}, "unsupported_parameter"),
        ({"chat_template_kwargs": {"a": 1}}, "unsupported_parameter"),
        ({"echo": True}, "unsupported_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "unsupported_parameter"),
        ({"top_logprobs": 2}, "invalid_parameter"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_parameter"),
        ({"logprobs": 1}, "invalid_parameter"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_parameter"),
        ({"stream_options": {}}, "invalid_parameter"),
    ],
)
async def test_refused_fields(client: Client, fields: dict[str, Any], code: str) -> None:
    openai_error(await client.post(PATH, json={"messages": HELLO, **fields}), 400, code)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(client: Client, field: str) -> None:
    body = await chat(client, **{field: 3})
    assert body["choices"][0]["message"]["content"] == "use"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_logprobs(client: Client) -> None:
    body = await chat(client, logprobs=True, top_logprobs=2, max_tokens=2)
    first = body["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "u"
    assert first["logprob"] == logprob_of(120)
    assert first["bytes"] == [117]
    assert len(first["top_logprobs"]) == 2
    assert (await chat(client))["choices"][0]["logprobs"] is None


async def test_response_formats(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {}}
    spellings = [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        {"type": "json_object", "schema": schema},  # LoRAX
        {"type": "json_object", "value": schema},  # Hugging Face
    ]
    for spelling in spellings:
        await chat(client, response_format=spelling)
        assert engine.last.sampling.grammar == Grammar("json_schema", '{"type":"object","properties":{}}')
    await chat(client, response_format={"type": "text"})
    assert engine.last.sampling.grammar is None


async def test_stream_begins_with_the_role_and_ends_with_the_reason(client: Client) -> None:
    pieces = await stream(client)
    choices = [piece["choices"][0] for piece in pieces]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["delta"] == {}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert all("role" not in choice["delta"] for choice in choices[1:])
    whole = await chat(client)
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]


async def test_streamed_choices_and_usage(client: Client, engine: FakeEngine) -> None:
    pieces = await stream(client, n=2, seed=0, temperature=1, stream_options={"include_usage": True})
    texts = ["", ""]
    for piece in pieces[:-1]:
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["delta"].get("content", "")
    assert texts == ["auser:hi\nassistant:", "buser:hi\nassistant:"]
    assert pieces[-1]["choices"] == []
    prompt_tokens = len(engine.prompt_ids(engine.last))
    assert pieces[-1]["usage"]["prompt_tokens"] == prompt_tokens
    assert pieces[-1]["usage"]["completion_tokens"] == 2 * (prompt_tokens + 2)


async def test_streamed_logprobs(client: Client) -> None:
    pieces = await stream(client, logprobs=True, max_tokens=3)
    tokens = [
        entry["token"] for piece in pieces for entry in (piece["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == ["u", "s", "e"]


async def test_a_full_queue_is_told_before_the_template_runs(client: Client, engine: FakeEngine) -> None:
    engine.capacity = 0
    messages = [{"role": "tool", "content": "the template would refuse this"}]
    openai_error(await client.post(PATH, json={"messages": messages}), 503, "overloaded")
