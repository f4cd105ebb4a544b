"""Server-sent events, parsed as the standard says and nothing more lenient."""

import json
from typing import Any

import httpx


def frames(raw: bytes) -> list[str]:
    """The data of each event; every event is one `data:` line and an empty line."""
    assert raw.endswith(b"\n\n")
    found = []
    for block in raw.decode().removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ")
        assert "\n" not in block
        found.append(block.removeprefix("data: "))
    return found


def events(raw: bytes, *, done: bool = True) -> list[dict[str, Any]]:
    """The JSON events; with `done`, the last frame must be [DONE]."""
    found = frames(raw)
    if done:
        assert found.pop() == "[DONE]"
    return [json.loads(frame) for frame in found]


def openai_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks status, shape and code; returns the error."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert error["message"]
    return error


def tgi_error(answer: httpx.Response, status: int, error_type: str) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == error_type, body
    message: str = body["error"]
    return message
