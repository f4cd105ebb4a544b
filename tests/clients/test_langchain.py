"""LangChain's models for OpenAI's routes: every answer is the one that openai's own client gets."""

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField
from langchain_openai import ChatOpenAI, OpenAI
from openai import NotFoundError
from openai import OpenAI as PlainClient
from pydantic import SecretStr

from tests.clients.live import LiveServer

PROMPT = "Which adapter answers the question?"
KEY = SecretStr("none")


@pytest.fixture
def expected(live_server: LiveServer) -> dict[str, str]:
    """By model: its greedy answer to PROMPT as a chat."""
    client = PlainClient(base_url=f"{live_server.base_url}/v1", api_key="none")
    models = (live_server.model, *live_server.adapters)
    found = {}
    for name in models:
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=8, temperature=0
        )
        found[name] = answer.choices[0].message.content or ""
    return found


def chat_model(server: LiveServer, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.base_url}/v1",
        api_key=KEY,
        model=model,
        max_completion_tokens=8,
        temperature=0,
        max_retries=0,
        stream_usage=True,
    )


def test_chat(live_server: LiveServer, expected: dict[str, str]) -> None:
    [legal, _] = live_server.adapters
    answer = chat_model(live_server, legal).invoke(PROMPT)
    assert answer.text == expected[legal]
    assert answer.response_metadata["model_name"] == legal
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert chat_model(live_server, legal).invoke([SystemMessage("Be brief."), HumanMessage(PROMPT)]).text


def test_chat_stream(live_server: LiveServer, expected: dict[str, str]) -> None:
    [legal, _] = live_server.adapters
    pieces = list(chat_model(live_server, legal).stream(PROMPT))
    assert "".join(piece.text for piece in pieces) == expected[legal]
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata is not None]
    assert [usage["output_tokens"] > 0 for usage in used] == [True]


def test_one_batch_of_different_adapters(live_server: LiveServer, expected: dict[str, str]) -> None:
    names = [*live_server.adapters, live_server.model, *reversed(live_server.adapters)]
    named = chat_model(live_server, live_server.model).configurable_fields(model_name=ConfigurableField(id="adapter"))
    answers = named.batch([PROMPT] * len(names), [{"configurable": {"adapter": name}} for name in names])
    assert [answer.text for answer in answers] == [expected[name] for name in names]


def test_adapters_are_told_apart(real_live: LiveServer) -> None:
    """Over the real engine each model has an answer of its own, so that the tests above cannot pass with another's."""
    answers = [chat_model(real_live, name).invoke(PROMPT).text for name in (real_live.model, *real_live.adapters)]
    assert len(set(answers)) == 3


async def test_asynchronous(live_server: LiveServer, expected: dict[str, str]) -> None:
    [_, poet] = live_server.adapters
    model = chat_model(live_server, poet)
    assert (await model.ainvoke(PROMPT)).text == expected[poet]
    assert "".join([piece.text async for piece in model.astream(PROMPT)]) == expected[poet]


def test_text(live_server: LiveServer) -> None:
    [legal, _] = live_server.adapters
    model = OpenAI(
        base_url=f"{live_server.base_url}/v1", api_key=KEY, model=legal, max_tokens=8, temperature=0, max_retries=0
    )
    whole = model.invoke(PROMPT)
    assert whole
    assert "".join(model.stream(PROMPT)) == whole
    assert model.batch([PROMPT, PROMPT]) == [whole, whole]
    assert model.generate([PROMPT, PROMPT]).llm_output is not None  # both prompts in one request


def test_errors(live_server: LiveServer) -> None:
    with pytest.raises(NotFoundError, match="The model `nobody` does not exist"):
        chat_model(live_server, "nobody").invoke(PROMPT)
