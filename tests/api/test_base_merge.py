"""`/adapters/{reference}/merge_into_base`: off unless the server was told, and told by its digest."""

from dataclasses import replace

import httpx
import pytest

from server.api.services import ApiSettings
from tests.api.events import openai_error
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import CONFIG

Client = httpx.AsyncClient
PATH = "/adapters/legal/merge_into_base"


async def test_off_by_default(client: Client, engine: FakeEngine) -> None:
    for method in ("POST", "DELETE"):
        answer = await client.request(method, PATH)
        openai_error(answer, 403, "merge_into_base_off")
    assert engine.base_holds is None


class TestOn:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return replace(settings, merges_into_base=True)

    async def test_in_and_out(self, client: Client, engine: FakeEngine) -> None:
        digest = (await client.get("/adapters/legal")).json()["digest"]
        files = {"config": CONFIG, "weights": b"same"}
        for name in ("aaa", "zzz"):  # the same content under two names
            assert (await client.put(f"/adapters/{name}", files=files)).status_code == 201
            assert (await client.post(f"/adapters/{name}/merge_into_base")).json()["name"] == name
        answer = await client.post(PATH)
        assert (answer.status_code, answer.json()["merged_into_base"]) == (200, True)
        assert engine.base_holds == digest
        assert (await client.get("/adapters/legal")).json()["merged_into_base"] is True
        assert (await client.delete("/adapters/poet/merge_into_base")).json()["merged_into_base"] is False
        assert engine.base_holds == digest
        answer = await client.delete(PATH)
        assert (answer.status_code, answer.json()["merged_into_base"]) == (200, False)
        assert engine.base_holds is None

    async def test_unknown(self, client: Client) -> None:
        assert (await client.post("/adapters/nobody/merge_into_base")).status_code == 404
