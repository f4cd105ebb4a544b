"""`POST /merge` and `/jobs`: what goes to the merger, what comes back, what is refused."""

import asyncio
from typing import Any

import httpx
import pytest

from adapters_store.errors import AdapterConflict, AdapterInvalid
from server.jobs.service import Jobs
from tests.api.events import openai_error
from tests.api.fake_engine import FakeEngine
from tests.api.fake_merger import FakeMerger
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient
ORDER: dict[str, Any] = {"name": "both", "method": "lego", "sources": [{"adapter": "legal"}, {"adapter": "poet"}]}


async def ended(jobs: Jobs, job_id: str) -> None:
    await asyncio.wait_for(jobs.get("public", job_id).ended.wait(), 30)


async def test_a_merge_is_a_job(client: Client, merger: FakeMerger, registry: FakeRegistry, jobs: Jobs) -> None:
    digests = [registry.resolve(name).digest for name in ("legal", "poet")]
    sources = [{"adapter": "legal@1", "weight": 0.5}, {"adapter": f"sha256:{digests[1]}", "weight": -1}]
    answer = await client.post("/merge", json=ORDER | {"sources": sources, "parameters": {"rank": 8}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["result"], job["error"]) == ("merge", None, None)
    assert job["state"] in ("queued", "running")
    expected = {"name": "both", "method": "lego", "sources": [(digests[0], 0.5), (digests[1], -1.0)]}
    assert merger.plans == [expected | {"parameters": {"rank": 8}, "if_match": None, "replace": False}]
    await ended(jobs, job["id"])
    found = (await client.get(f"/jobs/{job['id']}")).json()
    made = registry.info("both")
    assert (found["state"], found["progress"]) == ("done", 1.0)
    assert found["result"] == {"name": "both", "version": 1, "digest": made.digest, "new": True}
    assert (await client.get("/jobs")).json() == {"jobs": [found]}


async def test_waiting_gives_the_version(client: Client, merger: FakeMerger, registry: FakeRegistry) -> None:
    answer = await client.post("/merge?wait=true&replace=true", json=ORDER)
    assert (answer.status_code, answer.json()["name"], answer.json()["version"]) == (201, "both", 1)
    assert answer.headers["etag"] == f'"{answer.json()["digest"]}"'
    assert answer.headers["location"] == "/adapters/both@1"
    assert merger.plans[0]["replace"] is True
    headers = {"If-Match": f'"{"a" * 64}"'}
    await client.post("/merge", json=ORDER, headers=headers)
    assert merger.plans[1]["if_match"] == "a" * 64


async def test_a_recipe_that_is_there_is_done_at_once(
    client: Client, merger: FakeMerger, registry: FakeRegistry
) -> None:
    merger.stored = registry.put("both")
    answer = await client.post("/merge?wait=true", json=ORDER)
    assert (answer.status_code, answer.json()["digest"]) == (200, merger.stored.digest)
    job = (await client.post("/merge", json=ORDER)).json()
    assert (job["state"], job["result"]["new"], job["result"]["version"]) == ("done", False, 1)
    assert len(registry.versions("both")) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"method": 1}, "method"),
        ({"sources": []}, "sources"),
        ({"sources": [{"adapter": "legal", "weight": "1"}]}, "sources.0.weight"),
        ({"sources": [{"adapter": "legal", "weight": 1000}]}, "sources.0.weight"),
        ({"sources": [{"adapter": "legal", "wheight": 1}]}, "sources.0.wheight"),
        ({"sources": [{"adapter": "legal"}] * 65}, "sources"),
        ({"parameters": []}, "parameters"),
        ({"paramters": {}}, "paramters"),
    ],
)
async def test_bad_orders(client: Client, merger: FakeMerger, body: dict[str, Any], param: str) -> None:
    error = openai_error(await client.post("/merge", json=ORDER | body), 400, "invalid_parameter")
    assert error["param"] == param
    assert merger.plans == []


async def test_refusals(client: Client, merger: FakeMerger, registry: FakeRegistry, jobs: Jobs) -> None:
    unknown = ORDER | {"sources": [{"adapter": "legal"}, {"adapter": "nobody"}]}
    assert openai_error(await client.post("/merge", json=unknown), 404, "model_not_found")["param"] == "sources"
    for refused in (AdapterInvalid("No.", code="unknown_method", param="method"), AdapterConflict("Taken.")):
        merger.refuse = refused
        openai_error(await client.post("/merge", json=ORDER), refused.status, refused.code)
    merger.refuse, merger.failure = None, AdapterInvalid("No.", code="rank_limit", param="rank")
    openai_error(await client.post("/merge?wait=true", json=ORDER), 422, "rank_limit")
    job = (await client.get("/jobs")).json()["jobs"][0]
    assert (job["state"], job["error"]["code"], job["error"]["param"]) == ("failed", "rank_limit", "rank")
    assert len((await client.get("/jobs")).json()["jobs"]) == 1
    openai_error(await client.get("/jobs/nobody"), 404, "job_not_found")
    openai_error(await client.delete("/jobs/nobody"), 404, "job_not_found")
    assert ("public", "both") not in registry.names


async def test_a_job_that_ended_is_not_cancelled(client: Client, jobs: Jobs) -> None:
    job = (await client.post("/merge", json=ORDER)).json()
    await ended(jobs, job["id"])
    answer = await client.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["state"]) == (200, "done")


async def test_a_merge_leaves_other_pins_alone(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    await client.post("/adapters/legal/pin")
    await client.post("/merge?wait=true", json=ORDER)
    assert engine.pins == {registry.resolve("legal").digest}
