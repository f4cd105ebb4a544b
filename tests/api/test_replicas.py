"""What the HTTP side does for servers that share a store: freshness, rate limits, and what operators see."""

import httpx
import pytest

from server.replicas.state import LinkState
from tests.api.fake_registry import FakeRegistry
from tests.api.fake_replicas import OTHER, OWN, FakeReplicas

GENERATIONS = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/", {"inputs": "a"}),
    ("/v1/completions", {"model": "acme/tiny-base", "prompt": "a"}),
    ("/v1/chat/completions", {"model": "acme/tiny-base", "messages": [{"role": "user", "content": "a"}]}),
]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/adapters/fresh", None),
        ("GET", "/adapters/fresh/versions", None),
        ("GET", "/adapters/fresh/files/adapter_config.json", None),
        ("POST", "/adapters/fresh/warm", None),
        ("POST", "/adapters/fresh/pin", None),
        ("GET", "/v1/models/fresh", None),
        ("POST", "/tokenize", {"model": "fresh", "prompt": "a"}),
        ("POST", "/generate?adapter=fresh", {"inputs": "a"}),
        ("POST", "/v1/completions", {"model": "fresh", "prompt": "a"}),
        ("POST", "/v1/chat/completions", {"model": "fresh", "messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/generate", {"inputs": "a", "adapters": [{"name": "fresh", "weight": 0.5}]}),
    ],
)
async def test_a_name_that_another_server_has_just_written_is_found(
    method: str,
    path: str,
    body: dict[str, object] | None,
    client: httpx.AsyncClient,
    registry: FakeRegistry,
    replicas: FakeReplicas,
) -> None:
    replicas.arrives = lambda: registry.put("fresh")
    answer = await client.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    assert ("fresh", "public") in replicas.asked


async def test_the_base_is_not_asked_for(client: httpx.AsyncClient, replicas: FakeReplicas) -> None:
    for path, body in GENERATIONS:
        assert (await client.post(path, json=body)).status_code == 200
    assert replicas.asked == []


@pytest.mark.parametrize(("path", "body"), GENERATIONS)
async def test_a_client_over_its_rate_is_told_when_to_come_again(
    path: str, body: dict[str, object], client: httpx.AsyncClient, replicas: FakeReplicas
) -> None:
    replicas.seconds = 12.3
    answer = await client.post(path, json=body)
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "13"
    if "/v1/" in path:
        assert answer.json()["error"]["code"] == "rate_limited"
        assert answer.json()["error"]["type"] == "RateLimitError"
    else:
        assert answer.json()["error_type"] == "overloaded"
    assert replicas.clients == ["127.0.0.1"]
    assert replicas.asked == [], "a refused request costs no look-up"
    assert replicas.settled == []


async def test_only_generations_are_limited(client: httpx.AsyncClient, replicas: FakeReplicas) -> None:
    replicas.seconds = 5.0
    for path in ("/health", "/ready", "/info", "/metrics", "/adapters", "/adapters/legal", "/v1/models", "/replicas"):
        assert (await client.get(path)).status_code == 200, path
    assert replicas.clients == []


async def test_operators_see_every_server(client: httpx.AsyncClient, replicas: FakeReplicas) -> None:
    assert (await client.get("/replicas")).json() == {
        "redis_up": False,
        "replicas": [
            {
                "id": OWN.id,
                "address": OWN.address,
                "model": OWN.model,
                "running": 2,
                "waiting": 1,
                "kv_usage": 0.25,
                "resident": {"resident": ["d1"]},
                "age": 0.0,
            }
        ],
    }
    replicas.others, replicas.redis = [OTHER], LinkState(True, True, 5, 1, 1)
    body = (await client.get("/replicas")).json()
    assert body["redis_up"] is True
    assert [each["id"] for each in body["replicas"]] == [OWN.id, OTHER.id]


async def test_info_and_metrics_show_the_link(client: httpx.AsyncClient, replicas: FakeReplicas) -> None:
    assert (await client.get("/info")).json()["redis"] is None
    assert "polyrank_redis_up" not in (await client.get("/metrics")).text
    assert "polyrank_store_check_failures_total 2.0" in (await client.get("/metrics")).text
    replicas.others, replicas.redis = [OTHER], LinkState(True, True, 5, 2, 1)
    info = (await client.get("/info")).json()
    assert info["redis"] == {"up": True, "calls": 5, "failures": 2, "openings": 1}
    assert info["replicas"] == 2
    lines = (await client.get("/metrics")).text.splitlines()
    assert {
        "polyrank_redis_up 1.0",
        "polyrank_redis_calls_total 5.0",
        "polyrank_redis_failures_total 2.0",
        "polyrank_redis_breaker_openings_total 1.0",
        "polyrank_replicas 2.0",
        "polyrank_replica_changes_total 3.0",
        "polyrank_replica_lag_seconds 0.01",
        "polyrank_replica_notices_waiting 1.0",
        "polyrank_store_checks_total 7.0",
    } <= set(lines)


async def test_ready_does_not_depend_on_redis(client: httpx.AsyncClient, replicas: FakeReplicas) -> None:
    replicas.redis = LinkState(configured=True, up=False, failures=9)
    assert (await client.get("/ready")).status_code == 200
    assert (await client.get("/info")).json()["redis"]["up"] is False
