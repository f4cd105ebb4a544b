"""The tracer by OpenTelemetry. Of a request it tells times, counts, names and codes; no prompt and no answer.

Attributes follow the semantic conventions for HTTP and for generative AI (`gen_ai.`); what they do not know is under
`polyrank.`.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.engine.request import Timeline

_HEADERS = (b"traceparent", b"tracestate")
_OPERATIONS = {  # route -> gen_ai.operation.name
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/generate_stream": "text_completion",
    "/": "text_completion",
}
_NAMES = {  # fact -> attributes
    "request_id": ("polyrank.request_id",),
    "adapter": ("polyrank.adapter", "gen_ai.request.model"),
    "digest": ("polyrank.adapter.digest",),
    "code": ("error.type",),
}


def sending(endpoint: str | None) -> "Telemetry":
    """To a collector at `endpoint`, or where OpenTelemetry's variables say; sampled as these say, all by default."""
    address = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "polyrank"}
    # Registered nowhere: libraries that trace themselves do not begin to because this server does.
    provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return Telemetry(provider)


class Telemetry:
    """A `Tracer`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("polyrank")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> "Request":
        carrier = {str(name, "latin-1"): str(value, "latin-1") for name, value in headers if name in _HEADERS}
        attributes = {"http.request.method": method}
        context = self._propagator.extract(carrier)
        span = self._tracer.start_span(method, context, kind=SpanKind.SERVER, attributes=attributes)
        return Request(self._tracer, span, method)

    def close(self) -> None:
        self._provider.shutdown()


class Request:
    """A `RequestSpan`."""

    def __init__(self, tracer: Any, span: Any, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._method = method

    @property
    def trace_id(self) -> str:
        return str(format_trace_id(self._span.get_span_context().trace_id))

    def end(self, route: str, status: int, facts: Mapping[str, str], timelines: Sequence[Timeline]) -> None:
        span = self._span
        span.update_name(f"{self._method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        span.set_attributes({name: value for fact, value in facts.items() for name in _NAMES[fact]})
        if timelines:
            operation = {"gen_ai.operation.name": _OPERATIONS.get(route, "text_completion")}
            span.set_attributes({**operation, "gen_ai.provider.name": "polyrank"})
            span.set_attribute("gen_ai.usage.input_tokens", sum(each.prompt_tokens for each in timelines))
            span.set_attribute("gen_ai.usage.output_tokens", sum(each.output_tokens for each in timelines))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        for index, timeline in enumerate(timelines):
            self._phases(timeline, {"polyrank.choice": index})
        span.end()

    def _phases(self, timeline: Timeline, attributes: dict[str, Any]) -> None:
        """Queue, adapter loads, prefill and decode of one request to the engine, as far as it came."""
        for digest, begun, ended in timeline.loads:
            self._below("adapter load", begun, ended, {**attributes, "polyrank.adapter.digest": digest})
        self._below("queue", timeline.added, timeline.begun or timeline.ended, attributes)
        if timeline.begun:
            tokens = {
                "gen_ai.usage.input_tokens": timeline.prompt_tokens,
                "polyrank.cached_tokens": timeline.cached_tokens,
            }
            self._below("prefill", timeline.begun, timeline.answered or timeline.ended, {**attributes, **tokens})
        if timeline.answered:
            tokens = {"gen_ai.usage.output_tokens": timeline.output_tokens}
            self._below("decode", timeline.answered, timeline.ended, {**attributes, **tokens})

    def _below(self, name: str, begun: float, ended: float, attributes: dict[str, Any]) -> None:
        offset = time.time_ns() - time.monotonic_ns()
        start, end = (int(seconds * 1e9) + offset for seconds in (begun, ended))
        context = set_span_in_context(self._span)
        self._tracer.start_span(name, context, attributes=attributes, start_time=start).end(end)
