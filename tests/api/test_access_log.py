"""One line per answered request, with what an operator needs and nothing of the content."""

import logging

import httpx
import pytest

from server import logs
from server.api.drain import PROBES


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


def test_facts_stand_beside_the_event(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure("info", "json")
        facts = {"status": 200, "route": "/x"}
        logging.getLogger("test").info("request", extra={"answer": facts, "color_message": "no"})
    finally:
        root.handlers[:], root.level = handlers, level
    line = capsys.readouterr().err
    assert '"status": 200' in line
    assert '"route": "/x"' in line
    assert "color_message" not in line
