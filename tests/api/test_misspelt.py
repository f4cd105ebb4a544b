"""A slip of the pen is told, not answered by another model or at another length."""

import httpx
import pytest

from tests.api.events import openai_error, tgi_error

Client = httpx.AsyncClient


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        ({"parameters": {"max_tokens": 3}}, "parameters.max_new_tokens"),
        ({"params": {"max_new_tokens": 3}}, "parameters"),
        ({"parameters": {"temperatur": 1}}, "parameters.temperature"),
        ({"adaptor": "legal"}, "adapter"),
    ],
)
async def test_on_tgi_routes(client: Client, body: dict[str, object], meant: str) -> None:
    answer = await client.post("/generate", json={"inputs": "hi", **body})
    tgi_error(answer, 422, "validation")
    assert f"Did you mean `{meant}`?" in answer.json()["error"]


async def test_in_the_query(client: Client) -> None:
    answer = await client.post("/generate?adaptor=legal", json={"inputs": "hi"})
    assert answer.status_code == 422
    assert "Did you mean `?adapter`?" in answer.json()["error"]


async def test_on_openai_routes(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_token": 3}
    answer = await client.post("/v1/chat/completions", json=body)
    openai_error(answer, 400, "unknown_parameter")
    assert "max_tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("extra", [{"user": "me"}, {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}])
async def test_harmless_fields_of_others_pass(client: Client, extra: dict[str, object]) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, **extra})
    assert answer.status_code == 200, answer.text


async def test_parameters_that_tgi_knows_and_null_ones_pass(client: Client) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 2, "max_tokens": None, "watermark": False}}
    assert (await client.post("/generate", json=body)).status_code == 200
