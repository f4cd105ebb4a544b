"""The spans that OpenTelemetry's exporter gets of requests to the real engine."""

import http.server
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="comes with polyrank[otel], which [dev] brings")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.api.drain import Drain
from server.app import create_app
from server.otel import Telemetry, sending
from server.settings import load
from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import random_lora

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CANARY = "canary-of-a-prompt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("otel")
    save_tiny(root / "base", "llama")
    random_lora(root / "adapters" / "legal", tiny_model("llama"), 1, r=4, lora_alpha=8)
    return root


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def client(
    folders: Path, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("server.app.open_tracer", lambda endpoint: Telemetry(provider))
    options = {"model": str(folders / "base"), "store": "memory://", "preload": folders / "adapters", "compile": False}
    options |= {"kv_cache_memory": "4MiB", "adapter_memory": "4MiB"}
    app = create_app(load(options), Drain())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client,
    ):
        yield client


def by_name(exporter: InMemorySpanExporter) -> dict[str, Any]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_spans_of_a_request_with_an_adapter(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    body = {"model": "legal", "prompt": CANARY, "max_tokens": 5, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    usage = answer.json()["usage"]
    spans = by_name(exporter)
    assert set(spans) == {"POST /v1/completions", "queue", "adapter load", "prefill", "decode"}
    top = spans.pop("POST /v1/completions")
    assert (f"{top.context.trace_id:032x}", f"{top.parent.span_id:016x}") == (TRACE, PARENT)
    told = dict(top.attributes)
    assert told["http.response.status_code"] == 200
    assert told["polyrank.request_id"] == "mine"
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == told["polyrank.adapter"] == "legal@1"
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
    for span in spans.values():
        assert span.parent.span_id == top.context.span_id
        assert span.start_time <= span.end_time
    assert top.start_time <= spans["queue"].start_time
    assert spans["queue"].end_time == pytest.approx(spans["prefill"].start_time, abs=1e7)
    assert spans["prefill"].end_time == pytest.approx(spans["decode"].start_time, abs=1e7)
    assert spans["adapter load"].attributes["polyrank.adapter.digest"] == told["polyrank.adapter.digest"]
    whole = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert CANARY not in whole
    assert answer.json()["choices"][0]["text"] not in whole


async def test_without_a_parent_a_trace_begins(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    await client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 1}})
    spans = by_name(exporter)
    assert spans["POST /generate"].parent is None
    assert "adapter load" not in spans
    exporter.clear()
    await client.post("/generate", json={"inputs": "a"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert by_name(exporter) == {}, "the parent is not sampled"


async def test_each_choice_and_each_error_is_told(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    await client.post("/v1/completions", json={"prompt": "a", "n": 2, "max_tokens": 2, "temperature": 1})
    decoded = [span for span in exporter.get_finished_spans() if span.name == "decode"]
    assert [span.attributes["polyrank.choice"] for span in decoded] == [0, 1]
    exporter.clear()
    await client.post("/generate?adapter=nobody", json={"inputs": "a"})
    [span] = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "model_not_found"
    exporter.clear()
    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)
    assert exporter.get_finished_spans() == ()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Its address, and the path and body of what it got."""
    got: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_spans_reach_a_collector(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    address, got = collector
    tracer = sending(address)
    tracer.begin("GET", []).end("/v1/models", 200, {"request_id": "mine"}, [])
    tracer.close()
    [(path, body)] = got
    assert path == "/v1/traces"
    assert b"GET /v1/models" in body
    assert b"polyrank" in body
