"""Limits of a key: its requests and its tokens, what answers say of them, and what is charged in the end."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.application import create_api
from server.api.services import Services
from server.api.usage_limits import duration
from server.jobs.service import Jobs
from server.replicas.keys import Keys
from server.replicas.rate import Rate, Taken
from server.replicas.rate_limiter import RateLimiter
from tests.adapters_store.generator_support import write_generator
from tests.api.fake_engine import FakeEngine
from tests.api.fake_merger import FakeMerger
from tests.api.fake_registry import FakeRegistry
from tests.api.fake_replicas import FakeReplicas
from tests.support.api_keys import ApiKeys, bearer

PROMPT = [11, 12, 13, 14, 15]
ANSWER = 4


class Limited(FakeReplicas):
    """Counts for real, in this server alone, at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = None
        self.limiter = RateLimiter(Keys("test"), None, lambda: 1, lambda: 6000.0)

    async def take(self, client: str, rate: Rate, amount: int = 1) -> Taken:
        self.clients.append(client)
        return await self.limiter.take(client, rate, amount)

    def settle(self, taken: Taken, used: int) -> None:
        super().settle(taken, used)
        self.limiter.settle(taken, used)


@pytest.fixture
def replicas() -> Limited:
    return Limited()


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys()


@pytest.fixture
def api(services: Services, keys: ApiKeys) -> FastAPI:
    return create_api(dataclasses.replace(services, keys=keys))


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


async def ask(client: httpx.AsyncClient, secret: str, **fields: object) -> httpx.Response:
    body = {"model": "acme/tiny-base", "prompt": PROMPT, "max_tokens": ANSWER, **fields}
    return await client.post("/v1/completions", json=body, headers=bearer(secret))


async def test_requests_of_a_key(client: httpx.AsyncClient, keys: ApiKeys, replicas: Limited) -> None:
    one, other = keys.make("generate", rate_limit="2/minute"), keys.make("generate", rate_limit="2/minute")
    answers = [await ask(client, one) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-reset-requests"] == "2m0s"
    error = answers[2].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limited", "RateLimitError")
    assert "2/minute" in error["message"]
    assert 60 <= int(answers[2].headers["Retry-After"]) <= 120
    assert (await ask(client, other)).status_code == 200
    assert len(set(replicas.clients)) == 2
    assert not any(secret in client for client in replicas.clients for secret in (one, other)), "ids, never keys"
    assert "x-ratelimit-limit-tokens" not in answers[0].headers


async def test_a_key_without_a_rate_has_the_servers_own(
    client: httpx.AsyncClient, keys: ApiKeys, replicas: Limited
) -> None:
    replicas.rate = Rate(1, 60)
    plain, rich = keys.make("generate"), keys.make("generate", rate_limit="50/hour")
    assert [(await ask(client, plain)).status_code for _ in range(2)] == [200, 429]
    assert [(await ask(client, rich)).status_code for _ in range(2)] == [200, 200]
    replicas.rate = None
    answer = await ask(client, plain)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_tokens_of_a_key_are_those_used(client: httpx.AsyncClient, keys: ApiKeys, replicas: Limited) -> None:
    secret = keys.make("generate", token_limit="20/hour")
    first = await ask(client, secret)
    usage = first.json()["usage"]
    assert usage["total_tokens"] == len(PROMPT) + ANSWER
    assert first.headers["x-ratelimit-limit-tokens"] == "20"
    assert first.headers["x-ratelimit-remaining-tokens"] == "11"
    assert replicas.settled[-1][1:] == (9, 9)
    stopped = await ask(client, secret, max_tokens=2, prompt=[1])
    assert stopped.headers["x-ratelimit-remaining-tokens"] == "8"
    assert (await ask(client, secret, max_tokens=300)).status_code == 200, "one more fits"
    answer = await ask(client, secret)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "token_limited"
    assert "20/hour" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) > 60


async def test_what_is_asked_for_is_held_while_it_runs(
    client: httpx.AsyncClient, keys: ApiKeys, engine: FakeEngine, replicas: Limited
) -> None:
    """Many requests at once cannot all be let in before the first is charged."""
    secret = keys.make("generate", token_limit="100/hour")
    taken = await replicas.limiter.take(f"tokens-{keys.find(secret).id}", Rate(100, 3600), 100)
    assert (await ask(client, secret)).json()["error"]["code"] == "token_limited"
    replicas.limiter.settle(taken, 10)
    answer = await ask(client, secret)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100 - 10 - 9)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_of_several_answers_is_counted_once(
    stream: bool, client: httpx.AsyncClient, keys: ApiKeys, replicas: Limited
) -> None:
    secret = keys.make("generate", token_limit="1000/hour")
    answer = await ask(client, secret, n=3, prompt=[PROMPT, [1, 2]], stream=stream)
    assert answer.status_code == 200
    assert replicas.settled == [(f"tokens-{keys.find(secret).id}", 7 + 6 * ANSWER, 7 + 3 * (ANSWER + 2))], (
        "the fake repeats the prompt"
    )


async def test_a_refused_call_uses_nothing(
    client: httpx.AsyncClient, keys: ApiKeys, engine: FakeEngine, replicas: Limited
) -> None:
    secret = keys.make("generate", token_limit="100/hour")
    assert (await ask(client, secret, prompt=[1], max_tokens=10_000)).status_code == 400
    assert replicas.settled[-1][2] == 0
    engine.capacity = 0
    assert (await ask(client, secret)).status_code == 503
    assert len(replicas.settled) == 1, "nothing was taken"
    engine.capacity = 64
    assert (await ask(client, secret)).headers["x-ratelimit-remaining-tokens"] == "91"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_text_generation_inferences_routes_have_the_limits_too(
    path: str, client: httpx.AsyncClient, keys: ApiKeys
) -> None:
    secret = keys.make("generate", token_limit="3/hour")
    body = {"inputs": "abcdefgh", "parameters": {"max_new_tokens": 4}}
    answers = [await client.post(path, json=body, headers=bearer(secret)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["error_type"] == "overloaded"
    assert answers[1].headers["Retry-After"]


def search(name: str, iterations: int) -> dict[str, Any]:
    told = {"examples": [{"prompt": "ab", "answer": "c"}, {"prompt": "d", "answer": "ef"}], "iterations": iterations}
    sources = [{"adapter": "legal"}, {"adapter": "poet"}]
    return {"name": name, "method": "weight_search", "sources": sources, "parameters": told}


SEARCHED = (3 + 2) + (2 + 3)  # tokens of a trial, each text with the fake's begin token


async def test_a_weight_search_is_charged_as_generation_is(
    client: httpx.AsyncClient, keys: ApiKeys, jobs: Jobs
) -> None:
    both = ("generate", "adapters:write")
    secret = keys.make(*both, token_limit="1000/hour", rate_limit="4/minute")
    headers = bearer(secret)
    first = await client.post("/merge?wait=true", json=search("one", 40), headers=headers)
    assert first.status_code == 201
    assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - 40 * SEARCHED)
    assert first.headers["x-ratelimit-remaining-requests"] == "3"
    assert (await client.post("/merge", json=search("two", 500), headers=headers)).status_code == 202, "one more fits"
    known = len(jobs.list("public"))
    answer = await client.post("/merge", json=search("three", 1), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "token_limited")
    assert int(answer.headers["Retry-After"]) > 60
    assert len(jobs.list("public")) == known
    assert (await ask(client, secret)).json()["error"]["code"] == "token_limited", "generation has the same window"
    answer = await client.post("/merge", json=search("three", 1), headers=headers)
    assert answer.json()["error"]["code"] == "rate_limited"
    plain = {**search("sum", 1), "method": "cat", "parameters": {}}
    answer = await client.post("/merge", json=plain, headers=headers)
    assert answer.status_code == 202, "the engine computes nothing of it"
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    other = keys.make(*both, token_limit="1000/hour")
    assert (await client.post("/merge", json=search("three", 1), headers=bearer(other))).status_code == 202


async def test_a_search_that_begins_no_job_is_not_charged(
    client: httpx.AsyncClient, keys: ApiKeys, jobs: Jobs, merger: FakeMerger, registry: FakeRegistry
) -> None:
    headers = bearer(keys.make("adapters:write", token_limit="1000/hour"))
    merger.stored = registry.put("there")
    answer = await client.post("/merge", json=search("there", 10), headers=headers)
    assert (answer.json()["state"], "x-ratelimit-limit-tokens" in answer.headers) == ("done", False)
    merger.stored = None
    await jobs.stop()
    assert (await client.post("/merge", json=search("new", 10), headers=headers)).status_code == 503
    await jobs.start()
    answer = await client.post("/merge", json=search("new", 20), headers=headers)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 20 * SEARCHED)


async def test_an_equal_search_is_charged_once(
    client: httpx.AsyncClient, keys: ApiKeys, merger: FakeMerger, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    async def held(*_: object) -> None:
        await go.wait()

    monkeypatch.setattr(merger, "prepare", held)
    headers = bearer(keys.make("adapters:write", token_limit="1000/hour"))
    jobs = [(await client.post("/merge", json=search("one", 10), headers=headers)).json()["id"] for _ in range(3)]
    assert len(set(jobs)) == 1
    answer = await client.post("/merge", json=search("two", 20), headers=headers)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - (10 + 20) * SEARCHED)
    go.set()


async def test_examples_of_generators_are_charged(
    client: httpx.AsyncClient, keys: ApiKeys, generation: dict[str, Any], tmp_path: Path
) -> None:
    secret = keys.make("adapters:write", token_limit="110/hour", rate_limit="9/minute")
    headers = bearer(secret)
    generation["generators"].add("icm", write_generator(tmp_path), "upload", {})
    order: dict[str, Any] = {
        "name": "new",
        "sources": [{"adapter": "legal", "task": "law"}, {"adapter": "poet", "task": "verse"}],
        "tasks": {"law": {"examples": ["a", "bc"]}, "verse": {"examples": ["def"]}},
    }
    answer = await client.post("/generators", json=order, headers=headers)
    assert answer.status_code == 202
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(110 - (2 + 3 + 4 + 3 * 16))
    assert answer.headers["x-ratelimit-remaining-requests"] == "8"
    answer = await client.post("/generators/icm/adapters", json={"name": "m", "task": "law"}, headers=headers)
    assert (answer.status_code, "x-ratelimit-limit-tokens" in answer.headers) == (201, False)
    made = {"name": "made", "examples": ["abc", "d"], "statistics_of": "law"}
    answer = await client.post("/generators/icm/adapters", json=made, headers=headers)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(110 - 57 - (4 + 2 + 2 * 16))
    assert (await client.post("/generators/icm/adapters", json=made, headers=headers)).status_code == 200
    asked = len(generation["synthesizer"].orders)
    for path, body in (("/generators", order), ("/generators/icm/adapters", made)):
        answer = await client.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "token_limited")
        assert answer.headers["Retry-After"]
    assert len(generation["synthesizer"].orders) == asked


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0124, "12ms"), (1, "1s"), (59.6, "1m0s"), (360, "6m0s"), (3602, "1h0m2s"), (86400, "24h0m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
