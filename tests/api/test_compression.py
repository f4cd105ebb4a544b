"""`POST /adapters/{reference}/compress`: what goes to the compressor, what comes back, what is refused."""

from dataclasses import replace
from typing import Any

import httpx
import pytest

from adapters_store.errors import AdapterInvalid
from server.errors import Overloaded
from tests.api.events import openai_error
from tests.api.fake_compressor import ERRORS, TOLD, FakeCompressor
from tests.api.fake_engine import FakeEngine
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient


async def test_the_defaults(client: Client, compressor: FakeCompressor, registry: FakeRegistry) -> None:
    source = registry.resolve("legal").digest
    answer = await client.post("/adapters/legal/compress", json={})
    assert (answer.status_code, answer.json()["new"]) == (200, True)
    body = answer.json()
    assert (body["name"], body["version"], body["event"]) == ("legal", 2, "compress")
    assert (body["compression"], body["module_errors"]) == (TOLD, ERRORS)
    assert answer.headers["etag"] == f'"{body["digest"]}"'
    assert answer.headers["location"] == "/adapters/legal@2"
    expected = {"source": source, "target": None, "replace": False, "probe": None, "dtype": "int8", "rank": None}
    assert compressor.orders == [expected | {"energy": None, "max_error": None, "max_divergence": 0.02}]
    again = await client.post("/adapters/legal/compress", json={})
    assert (again.status_code, again.json()["version"]) == (200, 2)
    assert (await client.get("/adapters/legal")).json()["compression"] == TOLD


async def test_the_default_bound_suits_an_int8_base(
    client: Client, compressor: FakeCompressor, engine: FakeEngine
) -> None:
    engine.info = replace(engine.info, quantization="int8")
    for given, expected in (({}, 0.2), ({"max_divergence": 0.01}, 0.01), ({"max_divergence": None}, None)):
        assert (await client.post("/adapters/legal/compress", json=given)).status_code == 200
        assert compressor.orders[-1]["max_divergence"] == expected


async def test_everything_is_passed_on(client: Client, compressor: FakeCompressor) -> None:
    order: dict[str, Any] = {"dtype": "native", "rank": 4, "energy": 0.9, "target": "small", "replace": True}
    order |= {"max_error": 0.2, "max_divergence": None, "probe": ["one", "two"]}
    answer = await client.post("/adapters/legal@1/compress", json=order)
    assert (answer.status_code, answer.json()["name"]) == (200, "small")
    assert order.items() <= compressor.orders[0].items()


@pytest.mark.parametrize(
    "body",
    [
        {"dtype": "int2"},
        {"dtype": "int4 "},
        {"rank": 0},
        {"rank": "4"},
        {"energy": 0},
        {"energy": 1.5},
        {"max_error": 0},
        {"max_eror": 0.1},
        {"max_divergence": -1},
        {"probe": []},
        {"probe": [""]},
        {"probe": ["x"] * 65},
        {"probe": ["x" * 9000]},
        {"replace": 1},
    ],
)
async def test_bad_orders(client: Client, compressor: FakeCompressor, body: dict[str, Any]) -> None:
    error = openai_error(await client.post("/adapters/legal/compress", json=body), 400, "invalid_parameter")
    assert str(error["param"]).startswith(next(iter(body)))
    assert compressor.orders == []


async def test_refusals(client: Client, compressor: FakeCompressor, registry: FakeRegistry) -> None:
    openai_error(await client.post("/adapters/nobody/compress", json={}), 404, "model_not_found")
    compressor.failure = AdapterInvalid("Too lossy.", code="too_lossy", param="max_error")
    openai_error(await client.post("/adapters/legal/compress", json={}), 422, "too_lossy")
    compressor.failure = Overloaded("Full.")
    openai_error(await client.post("/adapters/legal/compress", json={}), 503, "overloaded")
    assert len(registry.versions("legal")) == 1


async def test_a_pin_ends_with_the_version(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    digest = registry.resolve("legal").digest
    await client.post("/adapters/legal/pin")
    assert engine.pins == {digest}
    await client.post("/adapters/legal/compress", json={})
    assert engine.pins == set()


JOINT: dict[str, Any] = {"adapters": ["legal", "poet"], "method": "jd_full", "rank": 16}


async def test_a_collection(client: Client, compressor: FakeCompressor, registry: FakeRegistry) -> None:
    sources = [registry.resolve(name).digest for name in ("legal", "poet")]
    answer = await client.post("/compress", json=JOINT)
    assert answer.status_code == 200
    found = answer.json()["adapters"]
    assert [(body["name"], body["version"], body["new"]) for body in found] == [("legal", 2, True), ("poet", 2, True)]
    assert [body["module_errors"] for body in found] == [ERRORS, ERRORS]
    expected = {"sources": sources, "probe": None, "method": "jd_full", "rank": 16, "clusters": 1}
    assert compressor.orders == [expected | {"max_error": None, "max_divergence": 0.02}]
    more = JOINT | {"clusters": 2, "max_error": 0.5, "max_divergence": None, "probe": ["one"]}
    assert (await client.post("/compress", json=more | {"method": "jd_diag"})).status_code == 200
    assert (compressor.orders[1]["method"], compressor.orders[1]["max_divergence"]) == ("jd_diag", None)


@pytest.mark.parametrize(
    "body",
    [
        {"adapters": []},
        {"adapters": ["a"] * 129},
        {"adapters": "legal"},
        {"method": "jd"},
        {"rank": 0},
        {"rank": None},
        {"clusters": 0},
        {"dtype": "int4"},
        {"max_error": 0},
        {"probe": []},
    ],
)
async def test_bad_orders_of_collections(client: Client, compressor: FakeCompressor, body: dict[str, Any]) -> None:
    error = openai_error(await client.post("/compress", json=JOINT | body), 400, "invalid_parameter")
    assert str(error["param"]).startswith(next(iter(body)))
    assert compressor.orders == []


async def test_refusals_of_collections(client: Client, compressor: FakeCompressor, registry: FakeRegistry) -> None:
    unknown = openai_error(
        await client.post("/compress", json=JOINT | {"adapters": ["legal", "nobody"]}), 404, "model_not_found"
    )
    assert unknown["param"] == "adapters"
    compressor.failure = AdapterInvalid("They differ.", code="modules_differ")
    openai_error(await client.post("/compress", json=JOINT), 422, "modules_differ")
    assert [len(registry.versions(name)) for name in ("legal", "poet")] == [1, 1]


async def test_pins_end_with_the_versions_of_a_collection(
    client: Client, engine: FakeEngine, registry: FakeRegistry
) -> None:
    for name in ("legal", "poet"):
        await client.post(f"/adapters/{name}/pin")
    await client.post("/compress", json=JOINT)
    assert engine.pins == set()
