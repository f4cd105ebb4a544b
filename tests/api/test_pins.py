"""A pin ends with the version that was pinned; nothing that no name leads to stays in the adapter memory."""

import httpx
import pytest

from tests.api.events import openai_error
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import CONFIG

Client = httpx.AsyncClient


async def put(client: Client, name: str, weights: bytes) -> str:
    files = {"config": CONFIG, "weights": weights}
    answer = await client.put(f"/adapters/{name}", files=files, params={"replace": "true"})
    assert answer.status_code == 201
    digest: str = answer.json()["digest"]
    return digest


@pytest.mark.parametrize("how", ["DELETE", "unload"])
async def test_a_deletion_ends_the_pins_of_every_version(client: Client, engine: FakeEngine, how: str) -> None:
    await put(client, "a", b"one")
    await put(client, "a", b"two")
    for reference in ("a@1", "a"):
        assert (await client.post(f"/adapters/{reference}/pin")).status_code == 200
    assert len(engine.pins) == 2
    if how == "DELETE":
        assert (await client.delete("/adapters/a")).status_code == 204
    else:
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 200
    assert not engine.pins


async def test_a_replacement_ends_the_pin_of_what_it_replaces(client: Client, engine: FakeEngine) -> None:
    oldest = await put(client, "a", b"one")
    await client.post("/adapters/a/pin")
    await put(client, "a", b"two")
    assert not engine.pins
    await client.post("/adapters/a@1/pin")
    await client.post("/adapters/a/pin")
    third = await put(client, "a", b"three")
    assert engine.pins == {oldest}, "an old version was pinned by its number"
    await client.post("/adapters/a/pin")
    assert engine.pins == {oldest, third}
    assert (await client.post("/adapters/a/rollback", json={"version": 2})).status_code == 200
    assert engine.pins == {oldest}


async def test_what_another_name_holds_stays_pinned(client: Client, engine: FakeEngine) -> None:
    digest = await put(client, "a", b"one")
    assert await put(client, "b", b"one") == digest
    await client.post("/adapters/a/pin")
    await client.delete("/adapters/a")
    assert engine.pins == {digest}
    await client.delete("/adapters/b")
    assert not engine.pins


async def test_what_is_deleted_cannot_be_pinned_by_its_digest(client: Client, engine: FakeEngine) -> None:
    digest = await put(client, "a", b"one")
    await client.delete("/adapters/a")
    openai_error(await client.post(f"/adapters/sha256:{digest}/pin"), 404, "model_not_found")
    assert not engine.pins
