"""Where the adapter may be named, and what wins."""

from typing import Any

import httpx
import pytest

from tests.api.events import events, openai_error, tgi_error
from tests.api.fake_engine import ALIAS, FINGERPRINT, MODEL_ID, FakeEngine
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient


def digest(registry: FakeRegistry, name: str) -> str:
    return registry.resolve(name).digest


PLACES: dict[str, dict[str, Any]] = {
    "query": {"params": {"adapter": "legal"}},
    "body": {"json": {"adapter": "legal"}},
    "model": {"json": {"model": "legal"}},
    "adapter_id": {"json": {"parameters": {"adapter_id": "legal"}}},
    "header": {"headers": {"X-Adapter": "legal"}},
}


@pytest.mark.parametrize("place", PLACES)
async def test_each_place_names_the_adapter(
    client: Client, engine: FakeEngine, registry: FakeRegistry, place: str
) -> None:
    how = dict(PLACES[place])
    body = {"inputs": "hi", **how.pop("json", {})}
    answer = await client.post("/generate", json=body, **how)
    assert answer.status_code == 200
    assert answer.headers["X-Adapter"] == "legal@1"
    assert answer.headers["X-Adapter-Digest"] == digest(registry, "legal")
    assert [adapter.digest for adapter in engine.last.adapters] == [digest(registry, "legal")]


SPELLINGS = ["legal", "legal@1", "base:legal", f"{MODEL_ID}:legal", "digest"]
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_each_spelling_means_the_same_and_is_echoed(
    client: Client, registry: FakeRegistry, spelling: str, path: str
) -> None:
    legal = digest(registry, "legal")
    name = f"sha256:{legal}" if spelling == "digest" else spelling
    body = {"model": name, **PROMPTS[path]}
    answer = await client.post(path, json=body)
    assert answer.headers["X-Adapter"] == "legal@1"
    assert answer.headers["X-Adapter-Digest"] == legal
    assert answer.json()["model"] == name
    streamed = await client.post(path, json={**body, "stream": True})
    assert {piece["model"] for piece in events(streamed.content)} == {name}


async def test_the_model_field_is_echoed_before_other_places(client: Client) -> None:
    body = {"model": "legal@1", "adapter": "base:legal", "prompt": "hi"}
    answer = await client.post("/v1/completions?adapter=legal", json=body)
    assert answer.json()["model"] == "legal@1"
    elsewhere = await client.post("/v1/completions?adapter=legal@1", json={"model": MODEL_ID, "prompt": "hi"})
    assert elsewhere.json()["model"] == "legal@1"


@pytest.mark.parametrize(
    "model", [None, MODEL_ID, "base:", "base", f"{MODEL_ID}:", "tgi", "dummy", ALIAS, f"sha256:{FINGERPRINT}"]
)
async def test_no_adapter_is_the_base(client: Client, engine: FakeEngine, model: str | None) -> None:
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "hi"})
    assert answer.status_code == 200
    assert engine.last.adapters == ()
    assert answer.headers["X-Adapter"] == MODEL_ID
    assert answer.headers["X-Adapter-Digest"] == FINGERPRINT
    assert answer.json()["model"] == MODEL_ID


@pytest.mark.parametrize("adapter", [None, "legal"])
async def test_what_answered_can_be_asked_for_again(client: Client, adapter: str | None) -> None:
    """No case of its own for the base: both headers name it as they name an adapter."""
    body = {"inputs": "hi", "adapter": adapter}
    first = (await client.post("/generate", json=body)).headers
    for reference in (first["X-Adapter"], f"sha256:{first['X-Adapter-Digest']}"):
        again = (await client.post("/generate", json={"inputs": "hi", "adapter": reference})).headers
        assert again["X-Adapter"] == first["X-Adapter"]
        assert again["X-Adapter-Digest"] == first["X-Adapter-Digest"]


async def test_a_placeholder_model_gives_way_to_an_adapter_of_that_name(client: Client, registry: FakeRegistry) -> None:
    registry.put("dummy")
    answer = await client.post("/v1/completions", json={"model": "dummy", "prompt": "hi"})
    assert answer.headers["X-Adapter"] == "dummy@1"


async def test_the_base_model_as_model_leaves_the_choice_to_other_places(client: Client) -> None:
    body = {"model": MODEL_ID, "adapter": "legal", "prompt": "hi"}
    assert (await client.post("/v1/completions", json=body)).headers["X-Adapter"] == "legal@1"


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        ({"adapter": "legal", "model": "poet"}, {}),
        ({"adapter": "legal"}, {"params": {"adapter": "poet"}}),
        ({"model": "legal"}, {"headers": {"X-Adapter": "poet"}}),
        ({"model": "legal"}, {"headers": {"X-Adapter": MODEL_ID}}),
        ({"adapter": "legal", "adapters": [{"name": "legal"}]}, {}),
        ({}, {"params": [("adapter", "legal"), ("adapter", "poet")]}),
        ({}, {"headers": [("X-Adapter", "legal"), ("X-Adapter", "poet")]}),
        ({}, {"headers": [("X-Adapter", MODEL_ID), ("X-Adapter", "poet")]}),
    ],
)
async def test_places_that_disagree_are_refused(
    client: Client, engine: FakeEngine, body: dict[str, Any], extra: dict[str, Any]
) -> None:
    openai_error(await client.post("/v1/completions", json={"prompt": "hi", **body}, **extra), 400, "adapter_conflict")
    answer = await client.post("/generate", json={"inputs": "hi", **body}, **extra)
    assert "disagree" in tgi_error(answer, 400, "validation")
    assert not engine.streams


async def test_a_conflict_names_its_places(client: Client) -> None:
    body = {"prompt": "hi", "adapter": "poet"}
    answer = await client.post("/v1/completions?adapter=legal", json=body, headers={"X-Adapter": "poet"})
    error = openai_error(answer, 400, "adapter_conflict")
    assert "query `adapter`, header `X-Adapter`, body `adapter`" in error["message"]


@pytest.mark.parametrize("field", ["adapter_id", "lora", "lora_id", "lora_path", "merged_adapters"])
async def test_names_of_other_servers_are_not_left_out(client: Client, engine: FakeEngine, field: str) -> None:
    """Ignored, they would give the base's answer for the adapter's."""
    extra = {field: "legal"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        messages = [{"role": "user", "content": "hi"}]
        answer = await client.post(path, json={"prompt": "hi", "messages": messages, **extra})
        error = openai_error(answer, 400, "invalid_parameter")
        assert error["param"] == field
        assert "`adapter`" in error["message"]
    answer = await client.post("/generate", json={"inputs": "hi", **extra})
    assert "`parameters.adapter_id`" in tgi_error(answer, 422, "validation")
    answer = await client.post("/generate", params=extra, json={"inputs": "hi"})
    assert "`?adapter=`" in tgi_error(answer, 422, "validation")
    assert not engine.streams


@pytest.mark.parametrize("field", ["adapter", "adapters", "model", "lora", "lora_id"])
async def test_names_in_the_wrong_depth_are_not_left_out(client: Client, engine: FakeEngine, field: str) -> None:
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": {field: "legal"}})
    assert "`parameters.adapter_id`" in tgi_error(answer, 422, "validation")
    assert not engine.streams


async def test_absent_by_null_is_absent(client: Client) -> None:
    nothing = {"adapter": None, "adapters": None, "model": None, "adapter_id": None}
    body = {"inputs": "hi", **nothing, "parameters": {**nothing, "lora_id": None}}
    assert (await client.post("/generate", json=body)).headers["X-Adapter"] == MODEL_ID


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        ({"adapter": ""}, {}),
        ({"adapter": "  "}, {}),
        ({"model": ""}, {}),
        ({"adapters": []}, {}),
        ({}, {"params": {"adapter": ""}}),
        ({}, {"headers": {"X-Adapter": ""}}),
        ({"parameters": {"adapter_id": ""}}, {}),
    ],
)
async def test_empty_names_are_not_the_base(
    client: Client, engine: FakeEngine, body: dict[str, Any], extra: dict[str, Any]
) -> None:
    """A shell variable that was never set must not choose the model."""
    answer = await client.post("/generate", json={"inputs": "hi", **body}, **extra)
    assert "is empty" in tgi_error(answer, 422, "validation")
    if "parameters" not in body:
        answer = await client.post("/v1/completions", json={"prompt": "hi", **body}, **extra)
        assert "is empty" in openai_error(answer, 400, "invalid_parameter")["message"]
    assert not engine.streams


async def test_the_same_adapter_in_several_places_is_fine(client: Client) -> None:
    body = {"adapter": "legal", "model": "base:legal", "prompt": "hi"}
    answer = await client.post("/v1/completions", json=body, headers={"X-Adapter": "legal@1"})
    assert answer.status_code == 200


@pytest.mark.parametrize("name", ["nobody", "legal@7", "../etc", "sha256:" + "0" * 64, "Légal", "x" * 500])
async def test_an_unknown_adapter_is_never_served_by_the_base(client: Client, engine: FakeEngine, name: str) -> None:
    error = openai_error(
        await client.post("/v1/completions", json={"model": name, "prompt": "hi"}), 404, "model_not_found"
    )
    assert error["message"] == f"The model `{name[:128]}` does not exist."
    assert error["type"] == "NotFoundError"
    assert error["param"] == "model"
    tgi_error(await client.post("/generate", json={"inputs": "x", "adapter": name}), 404, "model_not_found")
    assert not engine.streams


async def test_another_tenants_adapter_looks_unknown(client: Client, registry: FakeRegistry) -> None:
    registry.put("secret", tenant="other")
    there = await client.post("/v1/completions", json={"model": "secret", "prompt": "hi"})
    nowhere = await client.post("/v1/completions", json={"model": "nowher", "prompt": "hi"})
    assert there.status_code == 404
    assert there.text.replace("secret", "nowher") == nowhere.text


async def test_weighted_adapters(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    adapters = [{"name": "legal", "weight": 0.7}, {"name": "poet@1", "weight": -2}]
    answer = await client.post("/v1/completions", json={"prompt": "hi", "adapters": adapters})
    assert [(a.digest, a.weight) for a in engine.last.adapters] == [
        (digest(registry, "legal"), 0.7),
        (digest(registry, "poet"), -2.0),
    ]
    assert answer.headers["X-Adapter"] == "legal@1;w=0.7, poet@1;w=-2"
    assert answer.headers["X-Adapter-Digest"] == f"{digest(registry, 'legal')}, {digest(registry, 'poet')}"
    assert answer.json()["system_fingerprint"].endswith(f"{digest(registry, 'poet')[:16]}*-2")


@pytest.mark.parametrize(
    ("adapters", "status", "code"),
    [
        ([{"name": "legal"}, {"name": "base:legal"}], 400, "invalid_parameter"),
        ([{"name": "legal", "weight": 1e308}], 400, "invalid_parameter"),
        ([{"name": "legal", "weight": "1"}], 400, "invalid_parameter"),
        ([{"name": "nobody", "weight": 1}], 404, "model_not_found"),
        ([{"name": "legal"}] * 17, 400, "invalid_parameter"),
        ([{"weight": 1}], 400, "invalid_parameter"),
    ],
)
async def test_bad_weighted_adapters(client: Client, adapters: list[dict[str, Any]], status: int, code: str) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", "adapters": adapters})
    openai_error(answer, status, code)


async def test_lorax_merged_adapters_are_weights(client: Client, engine: FakeEngine) -> None:
    merged = {"ids": ["legal", "poet"], "weights": [0.5, 0.5], "merge_strategy": "linear", "density": 0.2}
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": {"merged_adapters": merged}})
    assert answer.status_code == 200
    assert [adapter.weight for adapter in engine.last.adapters] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("merged", "text"),
    [
        ({"ids": ["legal"], "weights": [1], "merge_strategy": "ties"}, "POST /merge"),
        ({"ids": ["legal", "poet"], "weights": [1]}, "2 ids and 1 weights"),
    ],
)
async def test_other_merges_are_not_done_per_request(client: Client, merged: dict[str, Any], text: str) -> None:
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": {"merged_adapters": merged}})
    assert text in tgi_error(answer, 422, "bad_merge")


async def test_adapter_id_and_merged_adapters_exclude_each_other(client: Client) -> None:
    parameters = {"adapter_id": "legal", "merged_adapters": {"ids": ["poet"], "weights": [1]}}
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": parameters})
    tgi_error(answer, 400, "validation")


async def test_a_replaced_adapter_changes_fingerprint_and_digest(client: Client, registry: FakeRegistry) -> None:
    body = {"model": "legal", "prompt": "hi"}
    before = await client.post("/v1/completions", json=body)
    registry.put("legal", b"other weights")
    after = await client.post("/v1/completions", json=body)
    assert after.headers["X-Adapter"] == "legal@2"
    assert before.headers["X-Adapter-Digest"] != after.headers["X-Adapter-Digest"]
    assert before.json()["system_fingerprint"] != after.json()["system_fingerprint"]
