"""Health, readiness, info, metrics, tokens."""

import re
from dataclasses import asdict, replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.errors import StorageFull
from adapters_store.formats import table
from server.api.services import Services
from server.metrics import Metrics
from tests.api.events import openai_error
from tests.api.fake_engine import BOS, MODEL_ID, VOCABULARY, FakeEngine
from tests.api.fake_registry import FakeRegistry

Client = httpx.AsyncClient


async def test_health(client: Client, engine: FakeEngine) -> None:
    assert (await client.get("/health")).status_code == 200
    engine.is_healthy = False
    openai_error(await client.get("/health"), 503, "unhealthy")


async def test_ready(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    assert (await client.get("/ready")).status_code == 200
    registry.failure = StorageFull("nobody reads this")
    openai_error(await client.get("/ready"), 503, "store_unavailable")
    engine.is_ready = False
    answer = await client.get("/ready")
    openai_error(answer, 503, "not_ready")
    assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_by_head(client: Client, engine: FakeEngine, path: str) -> None:
    answer = await client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    engine.is_healthy = engine.is_ready = False
    assert (await client.head(path)).status_code == 503


async def test_info(client: Client) -> None:
    body = (await client.get("/info")).json()
    assert body["model_id"] == MODEL_ID
    assert body["max_total_tokens"] == 2048
    assert body["max_concurrent_requests"] == 8
    assert body["max_best_of"] == 16
    assert re.match(r"\d", body["version"])


async def test_info_tells_every_method(client: Client) -> None:
    told = (await client.get("/info")).json()["methods"]
    assert told == [asdict(known) for known in table.known()]
    assert {each["status"] for each in told} == {"native", "folded", "declined"}


async def scrape(client: Client) -> dict[str, list[tuple[dict[str, str], float]]]:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


async def test_metrics_of_the_engine(client: Client, engine: FakeEngine, registry: FakeRegistry) -> None:
    digest = registry.resolve("legal").digest
    await client.post("/generate?adapter=legal", json={"inputs": "a"})
    engine.current = replace(
        engine.current, running=2, waiting=1, kv_usage=0.5, steps_total=7, running_adapters=(digest, "0" * 64)
    )
    assert "polyrank_expert_load_entropy" not in await scrape(client)
    engine.current = replace(engine.current, gated_adapters_resident=3, expert_entropies=((digest, 0.75),))
    found = await scrape(client)
    assert found["polyrank_running"] == [({}, 2.0)]
    assert found["polyrank_steps_total"] == [({}, 7.0)]
    assert found["polyrank_gated_adapters_resident"] == [({}, 3.0)]
    assert found["polyrank_expert_load_entropy"] == [({"adapter": "legal"}, 0.75)]
    assert found["vllm:num_requests_running"] == [({"model_name": MODEL_ID}, 2.0)]
    assert found["vllm:num_requests_waiting"] == [({"model_name": MODEL_ID}, 1.0)]
    assert found["vllm:kv_cache_usage_perc"] == [({"model_name": MODEL_ID}, 0.5)]
    assert found["vllm:cache_config_info"] == [({"block_size": "16", "num_gpu_blocks": "128"}, 1.0)]
    [(labels, value)] = found["vllm:lora_requests_info"]
    assert labels == {"max_lora": "4", "running_lora_adapters": f"{'0' * 12},legal", "waiting_lora_adapters": ""}
    assert value > 1.7e9


async def test_there_is_one_current_set_of_adapters_only(client: Client, engine: FakeEngine) -> None:
    for digest in ("a" * 64, "b" * 64):
        engine.current = replace(engine.current, waiting_adapters=(digest,))
        [(labels, _)] = (await scrape(client))["vllm:lora_requests_info"]
        assert labels["waiting_lora_adapters"] == digest[:12]


async def test_metrics_of_requests(client: Client) -> None:
    await client.post("/v1/completions", json={"prompt": "abc", "n": 2, "temperature": 0})
    found = await scrape(client)
    assert ({"endpoint": "completions"}, 2.0) in found["polyrank_generation_requests_total"]
    assert ({"endpoint": "completions"}, 2.0) in found["polyrank_time_to_first_token_seconds_count"]
    assert ({"endpoint": "completions"}, 6.0) in found["polyrank_inter_token_seconds_count"]
    assert ({"endpoint": "completions", "reason": "eos"}, 2.0) in found["polyrank_generations_finished_total"]


def test_two_applications_do_not_share_metrics(services: Services) -> None:
    services.metrics.rejected("x")
    assert b'code="x"' not in Metrics().render()


def test_unknown_methods_are_one_label() -> None:
    metrics = Metrics()
    for method in ("BREW", "WHEN"):
        metrics.http_answer(method, "/x", 405, 0.1)
    assert b'method="other",route="/x",status="405"} 2.0' in metrics.render()


async def test_tokenize(client: Client) -> None:
    body = (await client.post("/tokenize", json={"prompt": "ab", "model": "legal"})).json()
    assert body == {"count": 3, "max_model_len": 2048, "tokens": [BOS, 100, 101], "token_strs": None}
    body = (await client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False})).json()
    assert body["tokens"] == [100, 101]
    body = (await client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
    assert body["token_strs"] == ["<s>", "a", "b"]


async def test_tokenize_messages(client: Client, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = (await client.post("/tokenize", json={"messages": messages})).json()
    assert body["tokens"] == engine.tokenizer.encode("user:a\nassistant:", False)


async def test_detokenize(client: Client) -> None:
    assert (await client.post("/detokenize", json={"tokens": [100, 101]})).json() == {"prompt": "ab"}


async def test_tokenizer_info(client: Client) -> None:
    assert (await client.get("/tokenizer_info")).json() == {
        "tokenizer_class": "ByteTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": None,
        "chat_template": None,
        "model_max_length": 2048,
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [VOCABULARY]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
async def test_bad_tokens(client: Client, path: str, body: dict[str, object]) -> None:
    openai_error(await client.post(path, json=body), 400, "invalid_parameter")


async def test_tokenize_takes_no_empty_model(client: Client) -> None:
    openai_error(await client.post("/tokenize", json={"prompt": "a", "model": ""}), 400, "invalid_parameter")


async def test_tokenize_knows_only_models_that_exist(client: Client) -> None:
    openai_error(await client.post("/tokenize", json={"prompt": "a", "model": "nobody"}), 404, "model_not_found")
