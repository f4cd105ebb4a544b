"""Traces: off unless asked for, one span for each request and below it where its time went, nothing of its content."""

import sys

import pytest

from server.api.current import trace_id_of
from server.settings import SettingsError, load
from server.telemetry import open_tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f" 00-{TRACE}-{PARENT}-00 ", TRACE),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", TRACE),
        (f"00-{TRACE}-{PARENT}-01-more", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}", ""),
        ("\x1b[2J", ""),
        ("", ""),
    ],
)
def test_trace_ids_of_headers(given: str, found: str) -> None:
    assert trace_id_of([(b"host", b"x"), (b"traceparent", given.encode())]) == found


def test_two_parents_are_none() -> None:
    assert trace_id_of([(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())] * 2) == ""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_by_default(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.otel", None)  # nothing is imported
    assert open_tracer(None, environment) is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "server.otel", None)
    with pytest.raises(SettingsError, match=r"pip install 'polyrank\[otel\]'"):
        open_tracer("http://127.0.0.1:4318", {})
    assert open_tracer(None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}) is None
    assert [record.getMessage() for record in caplog.records] == ["traces_not_sent"]


@pytest.mark.parametrize("address", ["127.0.0.1:4318", "ftp://x", "http://user:secret@x", "http://x?a"])
def test_bad_addresses_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(SettingsError, match="--otlp-endpoint: must be") as error:
        load({"otlp_endpoint": address})
    assert "secret" not in str(error.value)
