"""Sends a plan and notes when each token came."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from server.load.connection import Connection, Cut
from server.load.plan import Shot

DONE = b"[DONE]"


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds since it was due.

    tokens: when each event with text came; counts are the server's where it tells them, else the events. error: a code,
    or empty for a whole answer.
    """

    model: str
    tokens: list[float] = field(default_factory=list)
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


class Load:
    """`outcomes` grows as requests end, and stays when the run is broken off."""

    def __init__(self, url: str, headers: dict[str, str], timeout: float) -> None:
        self.outcomes: list[Outcome] = []
        self.seconds = 0.0
        self._url = urlsplit(url)
        self._headers = headers
        self._timeout = timeout
        self._idle: list[Connection] = []

    async def run(self, shots: Sequence[Shot], at_once: int | None) -> None:
        """at_once: most requests under way together; None for those that have their time in the plan."""
        gate = asyncio.Semaphore(at_once or len(shots) or 1)
        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for shot in shots:
                    await gate.acquire()
                    if shot.at is not None:
                        await asyncio.sleep(max(0.0, start + shot.at - time.perf_counter()))
                    due = None if shot.at is None else start + shot.at
                    group.create_task(self._one(shot, due)).add_done_callback(lambda _: gate.release())
        finally:
            self.seconds = time.perf_counter() - start
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    async def _one(self, shot: Shot, due: float | None) -> None:
        connection = self._idle.pop() if self._idle else Connection(self._url, self._headers)
        outcome = Outcome(shot.model)
        start = time.perf_counter() if due is None else due
        try:
            async with asyncio.timeout(self._timeout):
                await self._read(connection, shot, outcome, start)
        except (TimeoutError, OSError, httptools.HttpParserError, ValueError) as error:
            connection.close()
            outcome.error = _transport_code(error)
        except asyncio.CancelledError:  # broken off: neither an answer nor an error of the server's
            connection.close()
            raise
        else:
            self._idle.append(connection)
        outcome.seconds = time.perf_counter() - start
        outcome.output_tokens = outcome.output_tokens or len(outcome.tokens)
        self.outcomes.append(outcome)

    async def _read(self, connection: Connection, shot: Shot, outcome: Outcome, start: float) -> None:
        buffer, whole = b"", False
        async for piece in connection.post(shot.path, json.dumps(shot.body).encode()):
            now = time.perf_counter() - start
            buffer += piece
            if connection.status != 200:
                continue
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:"):
                    whole = data == DONE or _take(json.loads(data), outcome, now) or whole
        if connection.status != 200:
            outcome.error = f"{connection.status} {_code(buffer)}".strip()
        elif not whole and not outcome.error:
            outcome.error = "truncated"


def _take(event: dict[str, Any], outcome: Outcome, now: float) -> bool:
    """One event of either protocol; whether it is the last."""
    if "error" in event:
        outcome.error = f"200 {_code_of(event)}"
        return False
    if usage := event.get("usage"):
        outcome.input_tokens = usage.get("prompt_tokens") or outcome.input_tokens
        outcome.output_tokens = usage.get("completion_tokens") or outcome.output_tokens
    choices = event.get("choices") or []
    if choices or event.get("token"):
        if (event.get("token") or {}).get("text") is not None or any(each.get("text") is not None for each in choices):
            outcome.tokens.append(now)
        details = event.get("details") or {}
        outcome.output_tokens = details.get("generated_tokens") or outcome.output_tokens
        outcome.input_tokens = details.get("input_length") or outcome.input_tokens
    return event.get("generated_text") is not None


def _code(body: bytes) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    return _code_of(value) if isinstance(value, dict) else ""


def _code_of(body: dict[str, Any]) -> str:
    """OpenAI's shape, TGI's and vLLM's older one."""
    error = body.get("error")
    if isinstance(error, dict):
        code = error.get("code")
        return code if isinstance(code, str) else str(error.get("type") or "error")
    return str(body.get("error_type") or body.get("type") or "error")


def _transport_code(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, Cut):
        return "truncated"
    if isinstance(error, OSError):
        return "unreachable"
    return "bad_event" if isinstance(error, ValueError) else "not_http"
