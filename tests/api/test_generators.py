"""`/generators`: what goes to the trainer and the synthesizer, what comes back, what is refused, who sees what."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from adapters_store import canonical
from adapters_store.errors import AdapterConflict, AdapterInvalid
from adapters_store.generation.container import dump
from adapters_store.generation.orders import TaskSpec, Wanted
from adapters_store.generators import Generators
from server.api.dependencies import Caller, authorise
from server.api.services import ApiSettings
from server.jobs.service import Jobs
from tests.adapters_store.generator_support import CONDITION, TASKS, losses, write_generator
from tests.api.events import openai_error
from tests.api.fake_generation import FakeSynthesizer, FakeTrainer
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient
ORDER: dict[str, Any] = {
    "name": "icm",
    "sources": [{"adapter": "legal", "task": "law"}, {"adapter": "poet@1", "task": "verse"}],
    "tasks": {"law": {"examples": ["a"], "with_adapter": "legal"}, "verse": {"condition": [0.5, -1]}},
}
ADAPTERS = "/generators/icm/adapters"


@pytest.fixture
def generators(generation: dict[str, Any]) -> Generators:
    found: Generators = generation["generators"]
    return found


@pytest.fixture
def trainer(generation: dict[str, Any]) -> FakeTrainer:
    found: FakeTrainer = generation["trainer"]
    return found


@pytest.fixture
def synthesizer(generation: dict[str, Any]) -> FakeSynthesizer:
    found: FakeSynthesizer = generation["synthesizer"]
    return found


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    return write_generator(tmp_path).read_bytes()


async def test_a_training_is_a_job(client: Client, trainer: FakeTrainer, registry: FakeRegistry, jobs: Jobs) -> None:
    answer = await client.post("/generators", json=ORDER | {"settings": {"epochs": 3}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["result"], job["error"]) == ("generate", None, None)
    refs = [registry.resolve(name) for name in ("legal", "poet")]
    assert trainer.plans == [
        {
            "name": "icm",
            "sources": [(refs[0].digest, "law"), (refs[1].digest, "verse")],
            "tasks": {"law": TaskSpec(None, ["a"], refs[0]), "verse": TaskSpec([0.5, -1])},
            "settings": {"epochs": 3},
            "if_match": None,
            "replace": False,
            "tenant": "public",
        }
    ]
    await asyncio.wait_for(jobs.get("public", job["id"]).ended.wait(), 30)
    found = (await client.get(f"/jobs/{job['id']}")).json()
    assert (found["state"], found["result"].pop("new")) == ("done", True)
    shown = await client.get("/generators/icm")
    assert shown.json() == found["result"]
    assert shown.headers["etag"] == f'"{found["result"]["digest"]}"'
    assert found["result"]["losses"] == losses()


async def test_waiting_gives_the_version(client: Client, trainer: FakeTrainer) -> None:
    answer = await client.post("/generators?wait=true&replace=true", json=ORDER)
    assert (answer.status_code, answer.json()["name"], answer.json()["tasks"]) == (201, "icm", list(TASKS))
    assert answer.headers["location"] == "/generators/icm@1"
    await client.post("/generators", json=ORDER, headers={"If-Match": f'"{"a" * 64}"'})
    assert [(plan["replace"], plan["if_match"]) for plan in trainer.plans] == [(True, None), (False, "a" * 64)]


async def test_what_is_there_is_done_at_once(
    client: Client, trainer: FakeTrainer, generators: Generators, tmp_path: Path
) -> None:
    trainer.stored, _ = generators.add("icm", write_generator(tmp_path), "train", {})
    answer = await client.post("/generators?wait=true", json=ORDER)
    assert (answer.status_code, answer.json()["digest"]) == (200, trainer.stored.digest)
    job = (await client.post("/generators", json=ORDER)).json()
    assert (job["state"], job["result"]["new"], job["result"]["version"]) == ("done", False, 1)


async def test_refusals(client: Client, trainer: FakeTrainer, generators: Generators) -> None:
    unknown = ORDER | {"sources": [{"adapter": "nobody", "task": "law"}]}
    assert openai_error(await client.post("/generators", json=unknown), 404, "model_not_found")["param"] == "sources"
    unknown = ORDER | {"tasks": {"law": {"examples": ["a"], "with_adapter": "nobody"}}}
    error = openai_error(await client.post("/generators", json=unknown), 404, "model_not_found")
    assert error["param"] == "tasks.law.with_adapter"
    for refused in (AdapterInvalid("No.", code="layouts_differ", param="sources"), AdapterConflict("Taken.")):
        trainer.refuse = refused
        openai_error(await client.post("/generators", json=ORDER), refused.status, refused.code)
    trainer.refuse, trainer.failure = None, AdapterInvalid("No.", code="layouts_differ")
    openai_error(await client.post("/generators?wait=true", json=ORDER), 422, "layouts_differ")
    assert generators.list() == ([], None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"sources": []}, "sources"),
        ({"sources": [{"adapter": "legal"}]}, "sources.0.task"),
        ({"sources": [{"adapter": "legal", "task": ""}]}, "sources.0.task"),
        ({"sources": [{"adapter": "legal", "task": "law"}] * 513}, "sources"),
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"law": {"examples": []}}}, "tasks.law.examples"),
        ({"tasks": {"law": {"examples": ["a"] * 65}}}, "tasks.law.examples"),
        ({"tasks": {"law": {"examples": ["a" * 8193]}}}, "tasks.law.examples.0"),
        ({"tasks": {"law": {"condition": [0.0] * 65_537}}}, "tasks.law.condition"),
        ({"tasks": {"law": {"condition": [True]}}}, "tasks.law.condition.0"),
        ({"tasks": {"law": {"conditon": [1.0]}}}, "tasks.law.conditon"),
        ({"settings": []}, "settings"),
        ({"setting": {}}, "setting"),
    ],
)
async def test_bad_trainings(client: Client, trainer: FakeTrainer, body: dict[str, Any], param: str) -> None:
    error = openai_error(await client.post("/generators", json=ORDER | body), 400, "invalid_parameter")
    assert error["param"] == param
    assert trainer.plans == []


async def test_upload_list_and_delete(client: Client, file: bytes, settings: ApiSettings) -> None:
    answer = await client.put("/generators/icm", content=file)
    digest = canonical.digest(file)
    assert (answer.status_code, answer.json()["digest"], answer.json()["event"]) == (201, digest, "upload")
    assert (answer.headers["etag"], answer.headers["location"]) == (f'"{digest}"', "/generators/icm@1")
    headers = {"Content-Type": "application/octet-stream"}
    assert (await client.put("/generators/icm", content=file, headers=headers)).status_code == 200
    await client.put("/generators/other", content=file)
    page = (await client.get("/generators?limit=1")).json()
    assert ([each["name"] for each in page["generators"]], page["next"]) == (["icm"], "icm")
    page = (await client.get("/generators?cursor=icm")).json()
    assert ([each["name"] for each in page["generators"]], page["next"]) == (["other"], None)
    got = await client.get(f"/generators/sha256:{digest}/file")
    assert (got.content, got.headers["content-length"]) == (file, str(len(file)))
    stale = {"If-Match": f'"{"0" * 64}"'}
    openai_error(await client.delete("/generators/icm", headers=stale), 412, "digest_changed")
    assert (await client.delete("/generators/icm")).status_code == 204
    for path in ("", "/file"):
        openai_error(await client.get(f"/generators/icm{path}"), 404, "generator_not_found")
    assert not list(settings.staging.iterdir())


@pytest.mark.parametrize(
    ("rank", "scale", "code"),
    [(2, 2.0, "generator_too_large"), ((1 << 31) - 1, 2.0, "rank_limit"), (2, 1e308, "generator_invalid")],
)
async def test_uploads_that_cost_too_much(client: Client, file: bytes, rank: int, scale: float, code: str) -> None:
    """Their headers are sound, but tell sizes that no adapter may take: a refusal and no 500."""
    told = json.loads(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]["polyrank"])
    told["settings"]["group"] = 1
    told["layout"]["modules"][0] |= {"rank": rank, "scale": scale}
    crafted = dump(told, {"model.last.bias": torch.zeros(1)})
    openai_error(await client.put("/generators/icm", content=crafted), 422, code)


async def test_refused_uploads(client: Client, file: bytes, settings: ApiSettings) -> None:
    for bad in (b"", file[:-1], file + b"\0", b"PK\x03\x04"):
        openai_error(await client.put("/generators/icm", content=bad), 422, "generator_invalid")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    openai_error(await client.put("/generators/icm", content=file, headers=kind), 415, "unsupported_media_type")
    large = b"\0" * (settings.max_upload_bytes + 1)
    openai_error(await client.put("/generators/icm", content=large), 413, "upload_too_large")

    async def pieces() -> Any:
        for start in range(0, len(large), 1 << 20):
            yield large[start : start + (1 << 20)]

    openai_error(await client.put("/generators/icm", content=pieces()), 413, "upload_too_large")
    assert not list(settings.staging.iterdir())


async def test_adapters(client: Client, file: bytes, synthesizer: FakeSynthesizer, registry: FakeRegistry) -> None:
    digest = (await client.put("/generators/icm", content=file)).json()["digest"]
    answer = await client.post(ADAPTERS, json={"name": "made", "task": "law", "seed": 7})
    assert (answer.status_code, answer.json()["name"]) == (201, "made")
    assert answer.headers["location"] == "/adapters/made@1"
    assert answer.headers["etag"] == f'"{registry.resolve("made").digest}"'
    assert (await client.post(ADAPTERS, json={"name": "made", "task": "law"})).status_code == 200
    told = {"examples": ["a", "b"], "with_adapter": "legal", "statistics_of": "law", "z": [1.0, 2]}
    match = {"If-Match": f'"{"a" * 64}"'}
    await client.post(f"{ADAPTERS}?replace=true", json={"name": "more", **told}, headers=match)
    await client.post(ADAPTERS, json={"name": "rebuilt", "task": "law", "reconstruct": True})
    legal = registry.resolve("legal")
    assert [order["wanted"] for order in synthesizer.orders] == [
        Wanted("law", seed=7),
        Wanted("law"),
        Wanted(examples=["a", "b"], adapter=legal, statistics_of="law", z=[1.0, 2]),
        Wanted("law", reconstruct=True),
    ]
    asked = synthesizer.orders[2]
    assert (asked["generator"], asked["if_match"], asked["replace"]) == (digest, "a" * 64, True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"task": ""}, "task"),
        ({"condition": []}, "condition"),
        ({"condition": [0.0] * 65_537}, "condition"),
        ({"examples": [""]}, "examples.0"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"z": ["a"]}, "z.0"),
        ({"reconstruct": 1}, "reconstruct"),
        ({"sed": 1}, "sed"),
    ],
)
async def test_bad_adapters(
    client: Client, file: bytes, synthesizer: FakeSynthesizer, body: dict[str, Any], param: str
) -> None:
    await client.put("/generators/icm", content=file)
    error = openai_error(await client.post(ADAPTERS, json={"name": "made", **body}), 400, "invalid_parameter")
    assert error["param"] == param
    assert synthesizer.orders == []


async def test_refused_adapters(client: Client, file: bytes, synthesizer: FakeSynthesizer) -> None:
    order = {"name": "made", "condition": [0.5] * CONDITION}
    openai_error(await client.post(ADAPTERS, json=order), 404, "generator_not_found")
    await client.put("/generators/icm", content=file)
    wrong = {"name": "made", "examples": ["a"], "with_adapter": "nobody"}
    assert openai_error(await client.post(ADAPTERS, json=wrong), 404, "model_not_found")["param"] == "with_adapter"
    synthesizer.failure = AdapterInvalid("No.", code="unknown_task", param="statistics_of")
    openai_error(await client.post(ADAPTERS, json=order), 422, "unknown_task")


async def test_tenants_do_not_see_each_other(
    client: Client, api: FastAPI, file: bytes, registry: FakeRegistry, trainer: FakeTrainer
) -> None:
    async def one() -> Caller:
        return Caller("one")

    async def two() -> Caller:
        return Caller("two")

    registry.put("own", tenant="one")
    order = ORDER | {"name": "late", "sources": [{"adapter": "own", "task": "law"}], "tasks": {"law": {}}}
    api.dependency_overrides[authorise] = one
    digest = (await client.put("/generators/icm", content=file)).json()["digest"]
    job = (await client.post("/generators", json=order)).json()
    api.dependency_overrides[authorise] = two
    for reference in ("icm", "icm@1", f"sha256:{digest}"):
        for path in ("", "/file"):
            answer = await client.get(f"/generators/{reference}{path}")
            openai_error(answer, 404, "generator_not_found")
        answer = await client.post(f"/generators/{reference}/adapters", json={"name": "made", "task": "law"})
        openai_error(answer, 404, "generator_not_found")
    openai_error(await client.delete("/generators/icm"), 404, "generator_not_found")
    assert (await client.get("/generators")).json() == {"generators": [], "next": None}
    openai_error(await client.get(f"/jobs/{job['id']}"), 404, "job_not_found")
    openai_error(await client.post("/generators", json=order), 404, "model_not_found")  # the sources are another's
    assert (await client.put("/generators/icm", content=file)).status_code == 201
    api.dependency_overrides[authorise] = one
    assert (await client.get("/generators/icm")).json()["version"] == 1
