"""What a web page in the operator's browser may do to a server that only the operator reaches: nothing."""

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from server.api.application import create_api
from server.api.services import Services
from server.metrics import Metrics
from tests.api.events import openai_error, tgi_error
from tests.api.fake_engine import FakeEngine

Client = httpx.AsyncClient
PIN = "/adapters/legal/pin"


@pytest.fixture
async def local(services: Services) -> AsyncIterator[Client]:
    """A server on loopback that is also known as gateway.example."""
    settings = replace(services.settings, loopback_only=True, allowed_hosts=frozenset({"gateway.example"}))
    api = create_api(replace(services, metrics=Metrics(), settings=settings))
    async with Client(transport=httpx.ASGITransport(app=api), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://polyrank:81", "http://polyrank@evil.example", "x", ""],
)
async def test_pages_of_others_change_nothing(client: Client, engine: FakeEngine, origin: str) -> None:
    headers = {"Origin": origin}
    error = openai_error(await client.post(PIN, headers=headers), 403, "origin_not_allowed")
    assert error["param"] == "Origin"
    openai_error(await client.delete("/adapters/legal", headers=headers), 403, "origin_not_allowed")
    tgi_error(await client.post("/generate", json={"inputs": "a"}, headers=headers), 403, "origin_not_allowed")
    assert not engine.pins
    assert not engine.streams
    assert (await client.get("/adapters/legal", headers=headers)).status_code == 200


async def test_refusals_are_counted_and_have_an_id(client: Client, services: Services) -> None:
    answer = await client.post(PIN, headers={"Origin": "null"})
    assert answer.headers["x-request-id"]
    assert b'polyrank_rejections_total{code="origin_not_allowed"} 1.0' in services.metrics.render()


@pytest.mark.parametrize(
    "origin", [None, "http://polyrank", "http://polyrank:80", "http://PolyRank", "https://polyrank"]
)
async def test_our_own_pages_and_other_programs_pass(client: Client, origin: str | None) -> None:
    assert (await client.post(PIN, headers={"Origin": origin} if origin else {})).status_code == 200


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://gateway.example", "http://gateway.example:3000"])
async def test_pages_of_allowed_hosts_pass(local: Client, origin: str) -> None:
    assert (await local.post(PIN, headers={"Origin": origin})).status_code == 200


@pytest.mark.parametrize("origin", ["http://127.0.0.1:3000", "http://localhost:8000", "http://evil.example"])
async def test_pages_of_other_local_servers_do_not(local: Client, origin: str) -> None:
    openai_error(await local.post(PIN, headers={"Origin": origin}), 403, "origin_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000", "gateway.example:443"]
)
async def test_names_of_a_local_server(local: Client, host: str) -> None:
    assert (await local.get("/health", headers={"Host": host})).status_code == 200


NOT_HERE = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "10.0.0.1",
    "[::2]",
    "",
    ":8000",
    "localhost:8000:1",
    "[localhost",
)


@pytest.mark.parametrize("host", NOT_HERE)
async def test_names_of_others_are_not_answered(local: Client, host: str) -> None:
    """A page whose own name suddenly leads to loopback would otherwise read everything."""
    for path in ("/health", "/adapters"):
        assert openai_error(await local.get(path, headers={"Host": host}), 400, "bad_host")["param"] == "Host"


async def test_a_second_host_does_not_help(local: Client) -> None:
    answer = await local.get("/health", headers=[("Host", "localhost"), ("Host", "evil.example")])
    openai_error(answer, 400, "bad_host")


async def test_any_name_leads_to_a_server_that_is_not_local(client: Client) -> None:
    assert (await client.get("/health", headers={"Host": "gateway.example"})).status_code == 200
