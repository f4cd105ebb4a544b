"""Reading, deleting and placing adapters; models; vLLM's routes."""

import os
from dataclasses import replace as changed
from pathlib import Path

import httpx
import pytest

from adapters_store.errors import AdapterCorrupt, AdapterInvalid, StorageFull, StoreUnavailable
from server.api.services import Services
from server.engine.status import ExpertLoad
from tests.api.events import openai_error
from tests.api.fake_engine import FINGERPRINT, MODEL_ID, FakeEngine
from tests.api.fake_registry import CONFIG, FakeRegistry

Client = httpx.AsyncClient


async def test_listing_by_pages(client: Client, registry: FakeRegistry) -> None:
    registry.put("zeta")
    first = (await client.get("/adapters", params={"limit": 2})).json()
    assert [info["name"] for info in first["adapters"]] == ["legal", "poet"]
    second = (await client.get("/adapters", params={"limit": 2, "cursor": first["next"]})).json()
    assert [info["name"] for info in second["adapters"]] == ["zeta"]
    assert second["next"] is None


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", "1e3"])
async def test_page_sizes(client: Client, limit: str) -> None:
    assert openai_error(await client.get(f"/adapters?limit={limit}"), 400, "invalid_parameter")["param"] == "limit"


async def test_one_adapter(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    digest = registry.resolve("legal").digest
    engine.resident.add(digest)
    engine.pins.add(digest)
    answer = await client.get("/adapters/legal")
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.json() == {
        "name": "legal",
        "version": 1,
        "digest": digest,
        "kind": "lora",
        "forms": ["LowRank"],
        "rank": {"min": 8, "max": 8},
        "modules": {"matched": 2, "total": 2},
        "parameters": 12,
        "bytes": 12,
        "base": {"id": MODEL_ID, "fingerprint": FINGERPRINT},
        "created": "2026-11-22T10:00:00.000+00:00",
        "event": "upload",
        "provenance": {"type": "upload"},
        "compression": None,
        "warnings": [],
        "proof": None,
        "knobs": {},
        "virtual_tokens": 0,
        "invocation": [],
        "tenant": "public",
        "residency": "resident",
        "progress": None,
        "pinned": True,
        "merged_into_base": False,
    }


async def test_use_of_ranks(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    found = registry.put("gated")
    registry.names["public", "gated"][-1] = changed(found, forms=("gated_low_rank",))
    engine.loads[found.digest] = {"q": ExpertLoad(2, (4, 0, 2, 2)), "v": ExpertLoad(1, (0, 0))}
    before = (await client.get("/adapters/gated/experts")).json()
    assert (before["gated"], before["residency"], before["modules"], before["entropy"]) == (True, "absent", {}, None)
    await client.post("/adapters/gated/warm")
    answer = (await client.get("/adapters/gated@1/experts")).json()
    assert answer == {
        "name": "gated",
        "version": 1,
        "digest": found.digest,
        "gated": True,
        "residency": "resident",
        "tokens": 4,
        "entropy": pytest.approx(0.75),
        "unused": 3,
        "modules": {
            "q": {
                "rank": 4,
                "active": 2,
                "tokens": 4,
                "shares": [0.5, 0.0, 0.25, 0.25],
                "entropy": pytest.approx(0.75),
                "unused": 1,
            },
            "v": {"rank": 2, "active": 1, "tokens": 0, "shares": [0.0, 0.0], "entropy": None, "unused": 2},
        },
    }


async def test_a_lora_has_no_choice_of_ranks(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    engine.resident.add(registry.resolve("legal").digest)
    answer = (await client.get("/adapters/legal/experts")).json()
    assert (answer["gated"], answer["modules"], answer["tokens"]) == (False, {}, 0)
    openai_error(await client.get("/adapters/nobody/experts"), 404, "model_not_found")


async def test_progress_of_a_load(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    engine.loading.add(registry.resolve("legal").digest)
    registry.near["legal"] = 0.25
    shown = (await client.get("/adapters/legal")).json()
    assert (shown["residency"], shown["progress"]) == ("loading", 0.25)


async def test_an_upload_tells_its_proof(client: Client) -> None:
    parts = {"config": CONFIG, "weights": b"new"}
    answer = await client.put("/adapters/new", files=parts)
    assert answer.status_code == 201
    assert answer.json()["proof"] == {
        "modules": {"matched": 2, "total": 2},
        "base": {"by": "name", "named": MODEL_ID},
        "probe": {"tokens": 53, "max_change": 1.5, "greedy_changed": 0.25},
        "reason": None,
    }
    assert (await client.get("/adapters/new")).json()["proof"] == answer.json()["proof"]
    again = await client.put("/adapters/new", files=parts)
    assert (again.status_code, again.json()["proof"]) == (200, answer.json()["proof"])


async def test_versions_and_rollback(client: Client, registry: FakeRegistry) -> None:
    registry.put("legal", b"second")
    old = (await client.get("/adapters/legal@1")).json()
    assert (await client.get("/adapters/legal")).json()["version"] == 2
    back = await client.post("/adapters/legal/rollback", json={"version": 1})
    assert back.status_code == 200
    assert back.json()["version"] == 3
    assert back.json()["digest"] == old["digest"]
    versions = (await client.get("/adapters/legal/versions")).json()["versions"]
    assert [info["version"] for info in versions] == [3, 2, 1]


@pytest.mark.parametrize("body", [{}, {"version": 0}, {"version": "1"}, {"version": 2**31}])
async def test_bad_rollbacks(client: Client, body: dict[str, object]) -> None:
    openai_error(await client.post("/adapters/legal/rollback", json=body), 400, "invalid_parameter")


async def test_files(client: Client) -> None:
    config = await client.get("/adapters/legal/files/adapter_config.json")
    assert config.content == CONFIG
    assert config.headers["content-type"] == "application/json"
    weights = await client.get("/adapters/legal@1/files/adapter_model.safetensors")
    assert weights.content == b"weightslegal"
    assert weights.headers["content-length"] == "12"


@pytest.mark.parametrize("name", ["adapter_model.bin", "..%2f..%2fetc%2fpasswd", "tokenizer.json"])
async def test_only_the_two_files_exist(client: Client, name: str) -> None:
    assert (await client.get(f"/adapters/legal/files/{name}")).status_code in (400, 404)


async def test_deleting(client: Client, registry: FakeRegistry) -> None:
    answer = await client.delete("/adapters/legal")
    assert answer.status_code == 204
    assert answer.content == b""
    openai_error(await client.get("/adapters/legal"), 404, "model_not_found")
    openai_error(await client.delete("/adapters/legal"), 404, "model_not_found")
    versions = (await client.get("/adapters/legal/versions")).json()["versions"]
    assert versions[0]["kind"] == "deleted"


async def test_deleting_only_what_was_seen(client: Client, registry: FakeRegistry) -> None:
    answer = await client.delete("/adapters/legal", headers={"If-Match": f'"{"0" * 64}"'})
    openai_error(answer, 412, "digest_changed")
    digest = registry.resolve("legal").digest
    answer = await client.delete("/adapters/legal", headers={"If-Match": f'"sha256:{digest}"'})
    assert answer.status_code == 204


async def test_if_match_any(client: Client) -> None:
    assert (await client.delete("/adapters/legal", headers={"If-Match": "*"})).status_code == 204
    assert (await client.get("/adapters/legal")).status_code == 404


@pytest.mark.parametrize("header", ["abc", '"abc"', 'W/"' + "0" * 64 + '"', "0" * 64])
async def test_if_match_is_one_digest(client: Client, header: str) -> None:
    answer = await client.delete("/adapters/legal", headers={"If-Match": header})
    openai_error(answer, 400, "invalid_parameter")


async def test_warm_pin_unpin(client: Client, registry: FakeRegistry) -> None:
    registry.put("legal", b"second")
    assert (await client.post("/adapters/legal@1/warm")).json()["residency"] == "resident"
    assert (await client.get("/adapters/legal")).json()["residency"] == "absent"
    registry.near["legal"] = 0.5
    assert (await client.get("/adapters/legal")).json()["residency"] == "absent"
    registry.near["legal"] = 1.0
    assert (await client.get("/adapters/legal")).json()["residency"] == "disk"
    assert (await client.get("/adapters/legal@1")).json()["residency"] == "resident", "the nearest place is told"
    assert (await client.post("/adapters/legal/pin")).json()["pinned"] is True
    assert (await client.post("/adapters/legal/unpin")).json()["pinned"] is False
    for action in ("warm", "pin", "unpin"):
        openai_error(await client.post(f"/adapters/nobody/{action}"), 404, "model_not_found")


async def test_errors_of_the_store_keep_status_and_code(client: Client, registry: FakeRegistry) -> None:
    registry.failure = AdapterCorrupt("damaged")
    answer = await client.delete("/adapters/legal")
    openai_error(answer, 503, "adapter_corrupt")
    assert "retry-after" not in answer.headers
    assert answer.headers["x-should-retry"] == "false"
    registry.failure = StoreUnavailable("busy")
    answer = await client.delete("/adapters/legal")
    openai_error(answer, 503, "store_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert "x-should-retry" not in answer.headers
    registry.failure = StorageFull("full")
    answer = await client.delete("/adapters/legal")
    openai_error(answer, 507, "storage_full")
    assert answer.headers["x-should-retry"] == "false"


async def test_models(client: Client, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.routes.models.PAGE", 1)
    body = (await client.get("/v1/models")).json()
    assert [model["id"] for model in body["data"]] == [MODEL_ID, "legal", "poet"]
    base, legal, _ = body["data"]
    assert base["parent"] is None
    assert legal["parent"] == MODEL_ID
    assert legal["root"] == f"adapter://legal@sha256:{registry.resolve('legal').digest}"
    assert legal["max_model_len"] == 2048
    assert legal["created"] == 1795341600
    assert legal["permission"] == []
    assert (await client.get("/v1/models/legal")).json() == legal
    assert (await client.get(f"/v1/models/{MODEL_ID}")).json() == base
    assert (await client.get("/v1/models/base")).json() == base
    assert (await client.get("/v1/models/legal@1")).json()["id"] == "legal@1"
    openai_error(await client.get("/v1/models/nobody"), 404, "model_not_found")


@pytest.fixture
def folder(adapter_root: Path) -> Path:
    folder = adapter_root / "new"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


async def load(client: Client, path: object, name: str = "new", **more: object) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


async def test_loading_as_vllm(client: Client, registry: FakeRegistry, folder: Path, settings: Services) -> None:
    answer = await load(client, folder)
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'new' added successfully."
    assert registry.seen_paths[0].parent != folder  # a copy, which nobody changes meanwhile
    assert (folder / "adapter_model.safetensors").exists()
    assert (await load(client, "new")).status_code == 200  # relative to the root; the same content again
    assert (await client.get("/v1/models/new")).status_code == 200


async def test_loading_twice(client: Client, folder: Path) -> None:
    await load(client, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    answer = await load(client, folder)
    error = openai_error(answer, 400, "adapter_exists")
    assert error["type"] == "InvalidUserInput"
    assert "has already been loaded" in error["message"]
    assert (await load(client, folder, load_inplace=True)).status_code == 200


async def test_loading_pinned(client: Client, engine: FakeEngine, folder: Path) -> None:
    await load(client, folder, pinned=True)
    assert len(engine.pins) == 1


@pytest.mark.parametrize(
    "path", ["/etc", "../outside", "new/../../outside", "https://x/y", "s3://b/k", "a\0b", "link", "~", "//etc"]
)
async def test_nothing_outside_the_root_is_read(
    client: Client, registry: FakeRegistry, folder: Path, adapter_root: Path, tmp_path: Path, path: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (outside / name).write_bytes(b"{}")
    (adapter_root / "link").symlink_to(outside)
    answer = await load(client, path)
    if path == "~":
        openai_error(answer, 404, "source_failed")
    else:
        assert str(tmp_path) not in str(openai_error(answer, 403, "source_not_allowed"))
    assert not registry.seen_paths


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
async def test_files_that_lead_outside_or_are_none(
    client: Client, registry: FakeRegistry, folder: Path, tmp_path: Path, name: str
) -> None:
    file, secret = folder / name, tmp_path / "secret"
    secret.write_bytes(b"{}")
    file.unlink()
    openai_error(await load(client, folder), 404, "source_failed")
    file.symlink_to(secret)
    openai_error(await load(client, folder), 403, "source_not_allowed")
    file.unlink()
    file.mkdir()
    openai_error(await load(client, folder), 404, "source_failed")
    file.rmdir()
    os.mkfifo(file)
    openai_error(await load(client, folder), 404, "source_failed")
    assert not registry.seen_paths


async def test_loading_too_much(client: Client, folder: Path, settings: object) -> None:
    (folder / "adapter_config.json").write_bytes(b" " * (257 << 10))
    openai_error(await load(client, folder), 422, "bad_config")
    (folder / "adapter_config.json").write_bytes(CONFIG)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate((4 << 20) + 1)
    openai_error(await load(client, folder), 413, "upload_too_large")


async def test_a_bad_adapter_is_422_and_leaves_nothing(
    client: Client, registry: FakeRegistry, folder: Path, services: Services
) -> None:
    registry.failure = AdapterInvalid("rank 512 is over the limit", code="rank_limit")
    openai_error(await load(client, folder), 422, "rank_limit")
    assert not list(services.settings.staging.iterdir())


async def test_unloading_as_vllm(client: Client) -> None:
    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "legal", "lora_int_id": 3})
    assert answer.text == "Success: LoRA adapter 'legal' removed successfully."
    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "legal"})
    assert openai_error(answer, 404, "model_not_found")["message"] == "The lora adapter 'legal' cannot be found."


async def test_deleting_takes_a_name_only(client: Client) -> None:
    error = openai_error(await client.delete("/adapters/legal@1"), 400, "name_expected")
    assert "not a version" in error["message"]
    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "legal@1"})
    openai_error(answer, 400, "name_expected")
    assert (await client.get("/adapters/legal")).status_code == 200
