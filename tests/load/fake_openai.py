"""A small server of OpenAI's completions API as vLLM speaks it: chunks, a last one with the usage, `[DONE]`."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeOpenAI:
    """behaviour: by model, `refuse`, `break` (an error event), `cut` (the connection), `garble` or `hang`."""

    url: str = ""
    behaviour: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    under_way: int = 0
    most: int = 0
    hanging: threading.Event = field(default_factory=threading.Event)

    @property
    def counts(self) -> Counter[str]:
        return Counter(body["model"] for body in self.bodies)

    async def models(self, request: Request) -> Response:
        lora = {"id": "lora", "object": "model", "parent": "base"}
        return JSONResponse({"object": "list", "data": [lora, {"id": "base", "object": "model", "parent": None}]})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        if self.behaviour.get(body["model"]) == "refuse":
            error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
            return JSONResponse({"error": error}, status_code=404)
        return StreamingResponse(self._chunks(body), media_type="text/event-stream")

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        behaviour = self.behaviour.get(body["model"], "")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for number in range(body["max_tokens"]):
                yield _event({"choices": [{"index": 0, "text": f" {number}", "finish_reason": None}]})
                await asyncio.sleep(0)
                if behaviour == "hang":
                    self.hanging.set()
                    await asyncio.sleep(60)
            if behaviour == "break":
                yield _event({"error": {"message": "out of luck", "type": "ServerError", "code": "engine_failure"}})
                return
            if behaviour == "cut":
                return
            if behaviour == "garble":
                yield b"data: {]\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.under_way -= 1


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


@contextmanager
def running() -> Iterator[FakeOpenAI]:
    fake = FakeOpenAI()
    routes = [Route("/v1/models", fake.models), Route("/v1/completions", fake.completions, methods=["POST"])]
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from now on a call waits for the server instead of failing
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="critical", timeout_graceful_shutdown=1, lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join(timeout=10)
