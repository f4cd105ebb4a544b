"""What a request chooses of its adapters, on every route."""

from typing import Any

import httpx
import pytest

from server.engine.request import WeightedAdapter
from tests.api.events import openai_error, tgi_error
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
OPENAI: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": CHAT}
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")


@pytest.fixture
def digest(registry: FakeRegistry) -> str:
    """Of `dial`, which has every knob."""
    registry.put("dial")
    knobs = {"rank": {"max": 8}, "gate": {"default": 0.5}, "task": {"count": 4}}
    return registry.tell("dial", knobs=knobs).digest


def body(path: str, adapter: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
    if path == "/generate":
        return {"inputs": "hi", "adapter": adapter, "parameters": parameters}
    return {**OPENAI[path], "adapter": adapter, "adapter_parameters": parameters}


def weighted(digest: str, *parts: tuple[str, float]) -> tuple[WeightedAdapter, ...]:
    return tuple(WeightedAdapter(digest + variant, weight) for variant, weight in parts)


async def test_counts_are_told_as_whole_numbers(client: Client, digest: str) -> None:
    text = (await client.get("/adapters/dial")).text
    assert '"knobs":{"rank":{"max":8},"gate":{"default":0.5},"task":{"count":4}}' in text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("parameters", "expected", "told"),
    [
        ({}, [("", 1.0)], ""),
        ({"rank": None}, [("", 1.0)], ""),
        ({"rank": 4}, [(":rank=4", 1.0)], ";rank=4"),
        ({"rank": 8}, [("", 1.0)], ";rank=8"),
        ({"task": 2, "rank": 1}, [(":rank=1,task=2", 1.0)], None),
        ({"gate": 0.25}, [(":branch=0", 0.25), (":branch=1", 0.75)], ";gate=0.25"),
        ({"gate": 1}, [(":branch=0", 1.0)], ";gate=1"),
    ],
)
async def test_a_choice_names_the_variants(
    client: Client,
    engine: FakeEngine,
    digest: str,
    path: str,
    parameters: dict[str, Any],
    expected: list[tuple[str, float]],
    told: str | None,
) -> None:
    answer = await client.post(path, json=body(path, "dial", parameters))
    assert answer.status_code == 200
    assert engine.last.adapters == weighted(digest, *expected)
    assert answer.headers["X-Adapter-Digest"] == digest
    if told is not None:
        assert answer.headers["X-Adapter"] == f"dial@1{told}"


@pytest.mark.parametrize("path", PATHS)
async def test_another_choice_is_another_system(client: Client, digest: str, path: str) -> None:
    if path == "/generate":
        return
    seen = []
    for parameters in ({}, {"rank": 4}, {"rank": 5}, {"gate": 0.25}, {"gate": 0.75}):
        answer = await client.post(path, json=body(path, "dial", parameters))
        seen.append(answer.json()["system_fingerprint"])
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("adapter", "parameters", "code"),
    [
        ("dial", {"rank": 9}, "knob_out_of_range"),
        ("dial", {"task": 4}, "knob_out_of_range"),
        ("legal", {"rank": 2}, "knob_unsupported"),
        ("legal", {"gate": 0.5}, "knob_unsupported"),
        (None, {"task": 1}, "knob_unsupported"),
    ],
)
async def test_what_cannot_be_chosen_is_refused(
    client: Client,
    engine: FakeEngine,
    digest: str,
    path: str,
    adapter: str | None,
    parameters: dict[str, Any],
    code: str,
) -> None:
    answer = await client.post(path, json=body(path, adapter, parameters))
    if path == "/generate":
        tgi_error(answer, 422, code)
    else:
        place = "adapter_parameters." + next(iter(parameters))
        assert openai_error(answer, 422, code)["param"] == place
    assert not engine.streams


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parameters", [{"rank": 0}, {"rank": "4"}, {"gate": 1.5}, {"gate": -0.1}, {"task": -1}])
async def test_a_value_that_no_adapter_has_is_refused(
    client: Client, engine: FakeEngine, digest: str, path: str, parameters: dict[str, Any]
) -> None:
    answer = await client.post(path, json=body(path, "dial", parameters))
    assert answer.status_code == (422 if path == "/generate" else 400)
    assert not engine.streams


@pytest.mark.parametrize("path", OPENAI)
async def test_an_unknown_knob_is_refused(client: Client, engine: FakeEngine, digest: str, path: str) -> None:
    answer = await client.post(path, json=body(path, "dial", {"ranks": 4}))
    assert openai_error(answer, 400, "invalid_parameter")["param"] == "adapter_parameters.ranks"
    assert not engine.streams


async def test_each_of_several_adapters_has_its_own(
    client: Client, engine: FakeEngine, registry: FakeRegistry, digest: str
) -> None:
    adapters = [
        {"name": "dial", "weight": 0.5, "parameters": {"gate": 0.25, "rank": 2}},
        {"name": "legal", "weight": 2.0},
    ]
    answer = await client.post("/v1/completions", json={"prompt": "hi", "adapters": adapters})
    assert answer.headers["X-Adapter"] == "dial@1;rank=2;gate=0.25;w=0.5, legal@1;w=2"
    legal = registry.resolve("legal").digest
    assert engine.last.adapters == (
        *weighted(digest, (":rank=2,branch=0", 0.125), (":rank=2,branch=1", 0.375)),
        WeightedAdapter(legal, 2.0),
    )
    adapters[1]["parameters"] = {"rank": 2}
    answer = await client.post("/v1/completions", json={"prompt": "hi", "adapters": adapters})
    assert openai_error(answer, 422, "knob_unsupported")["param"] == "adapters.1.parameters.rank"
    twice = {"prompt": "hi", "adapters": [{"name": "dial"}], "adapter_parameters": {"rank": 2}}
    answer = await client.post("/v1/completions", json=twice)
    assert openai_error(answer, 400, "adapter_conflict")["param"] == "adapter_parameters.rank"


async def test_the_engine_is_told_where_an_adapter_acts(
    client: Client, engine: FakeEngine, registry: FakeRegistry
) -> None:
    told = registry.tell("legal", virtual_tokens=8, invocation=(5, 7))
    await client.post("/generate", json={"inputs": "hi", "adapter": "legal"})
    assert engine.last.adapters == (WeightedAdapter(told.digest, 1.0, 8, (5, 7)),)
