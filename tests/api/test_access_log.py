"""One line per answered request, with what an operator needs and nothing of the content."""

import json
import logging
from collections.abc import Iterator

import httpx
import pytest

from server import logs
from server.api.drain import PROBES
from tests.api.fake_engine import FakeEngine


async def test_a_line_per_request_without_its_content(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "server.api.context")
    await client.post("/generate?adapter=legal", json={"inputs": "a secret text", "parameters": {"max_new_tokens": 2}})
    await client.post("/generate?adapter=nobody", json={"inputs": "a secret text"})
    await client.get("/health")
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    answers = [record.__dict__["answer"] for record in lines]
    assert [(a["route"], a["status"], a.get("code")) for a in answers] == [
        ("/generate", 200, None),
        ("/generate", 404, "model_not_found"),
        ("/health", 200, None),
    ]
    assert answers[0]["adapter"].startswith("legal@")
    assert answers[0]["request_id"]
    assert "secret" not in caplog.text + str(answers)
    assert [record.levelno for record in lines] == [logging.INFO, logging.INFO, logging.DEBUG]
    assert "/health" in PROBES


async def test_every_line_on_the_way_of_a_request_has_its_id(
    client: httpx.AsyncClient, engine: FakeEngine, root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    engine.refuse = ValueError("an unforeseen fault")
    logs.configure("info", "json")
    headers = {"X-Request-Id": "mine", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    await client.post("/generate", json={"inputs": "a"}, headers=headers)
    await client.post("/generate", json={"inputs": "a"}, headers={"X-Request-Id": "b\x1b", "traceparent": "forged"})
    logging.getLogger("test").info("of nobody")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == [*("request_failed", "request") * 2, "of nobody"]
    first, second = lines[:2], lines[2:4]
    assert "an unforeseen fault" in first[0]["exception"]
    assert {(line["request_id"], line["trace_id"]) for line in first} == {("mine", trace)}
    assert second[0]["request_id"] == second[1]["request_id"]
    assert second[0]["request_id"].isalnum()
    assert not [line for line in (*second, lines[4]) if "trace_id" in line]
    assert "request_id" not in lines[4]


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, whose handlers and level are put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


async def test_control_characters_of_a_url_do_not_reach_the_log(
    client: httpx.AsyncClient, root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("text", "json"):
        logs.configure("info", form)
        await client.get("/adapters/a%00%1b%5b2Jb%C2%9b%E2%80%AE%0d%0aforged")
        lines = capsys.readouterr().err
        assert lines.count("\n") == 1
        assert lines[:-1].isprintable()
        assert "forged" in lines


def test_a_traceback_keeps_its_lines(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("test").error("failed\n", exc_info=ValueError("a\x1b[2J\nb"))
    lines = capsys.readouterr().err.splitlines()
    assert "failed" in lines[0]
    assert lines[1:] == ["ValueError: a\\x1b[2J", "b"]


def test_facts_stand_beside_the_event(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    facts = {"status": 200, "route": "/x"}
    logging.getLogger("test").info("request", extra={"answer": facts, "color_message": "no"})
    line = capsys.readouterr().err
    assert '"status": 200' in line
    assert '"route": "/x"' in line
    assert "color_message" not in line
