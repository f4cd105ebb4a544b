"""A small server with Polyrank's routes, all in memory, that does what a test tells it."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from socket import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.api.schemas.adapters import AdapterInfo
from server.api.schemas.generators import GeneratorInfo
from server.api.schemas.jobs import JobInfo
from tests.api.fake_compressor import ERRORS, TOLD

Content = tuple[bytes, bytes]  # adapter_config.json, adapter_model.safetensors


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": "Error", "param": None, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


@dataclass
class FakeServer:
    """`versions`: the contents of each name, oldest first. `requests`: method, path and query of every call."""

    url: str = ""
    versions: dict[str, list[Content]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)  # bodies of calls to compress
    generators: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=lambda: ["done"])  # of the one job, at every look the next
    refuse: Response | None = None  # the answer to every call
    events: list[dict[str, Any]] = field(default_factory=list)
    before_weights: threading.Event | None = None  # set when a download of weights hangs half-way
    page_size: int = 2

    def reset(self) -> None:
        for spec in fields(self):
            if spec.name != "url":
                fresh = spec.default if spec.default_factory is MISSING else spec.default_factory()
                setattr(self, spec.name, fresh)

    def info(self, name: str, version: int) -> dict[str, Any]:
        config, weights = self.versions[name][version - 1]
        noop = {"code": "adapter_is_noop", "message": "All of B is zero. \x1b[31m"}
        told = {
            "name": name,
            "version": version,
            "digest": hashlib.sha256(config + weights).hexdigest(),
            "kind": "lora",
            "forms": ["low_rank"],
            "rank": {"min": 4, "max": 8},
            "modules": {"matched": 60, "total": 210},
            "parameters": len(weights) // 2,
            "bytes": len(weights),
            "base": {"id": "tiny", "fingerprint": "f" * 8},
            "created": "2026-11-22T10:00:00Z",
            "event": "upload",
            "provenance": {},
            "compression": None,
            "warnings": [noop] if b"noop" in weights else [],
            "proof": None,
            "knobs": {},
            "virtual_tokens": 0,
            "invocation": [],
            "tenant": "public",
        }
        return AdapterInfo.model_validate(told).model_dump(mode="json")  # the real server's shape

    async def push(self, request: Request) -> Response:
        name = request.path_params["name"]
        async with request.form() as form:
            parts = [form["config"], form["weights"]]
            files = [await part.read() for part in parts if isinstance(part, UploadFile)]
        content = (files[0], files[1])
        held = self.versions.get(name, [])
        if held and held[-1] == content:
            return JSONResponse(self.info(name, len(held)))
        if held and request.query_params.get("replace") != "true":
            return error(409, "adapter_exists", f"{name} holds other content.")
        self.versions[name] = [*held, content]
        return JSONResponse(self.info(name, len(held) + 1), status_code=201)

    async def adapter(self, request: Request) -> Response:
        name, _, version = request.path_params["name"].partition("@")
        if name not in self.versions:
            return error(404, "model_not_found", f"The model `{name}` does not exist.")
        if request.method == "DELETE":
            del self.versions[name]
            return Response(status_code=204)
        number = int(version or len(self.versions[name]))
        file = request.path_params.get("file")
        if file is None:
            return JSONResponse(self.info(name, number))
        config, weights = self.versions[name][number - 1]
        if file == "adapter_config.json":
            return Response(config)
        return self._hanging(weights) if self.before_weights else Response(weights)

    async def compress(self, request: Request) -> Response:
        self.orders.append(await request.json())
        return JSONResponse(
            self._compressed(self.orders[-1].get("target") or request.path_params["name"].partition("@")[0])
        )

    async def compress_jointly(self, request: Request) -> Response:
        self.orders.append(await request.json())
        return JSONResponse({"adapters": [self._compressed(name) for name in self.orders[-1]["adapters"]]})

    async def merge(self, request: Request) -> Response:
        self.orders.append(await request.json())
        return JSONResponse(self._job(), status_code=202)

    async def train(self, request: Request) -> Response:
        self.orders.append(await request.json())
        return JSONResponse(self._job("generate"), status_code=202)

    async def list_generators(self, request: Request) -> Response:
        infos = [self.generator(name) for name in sorted(self.generators)]
        start = int(request.query_params.get("cursor", 0))
        rest = start + self.page_size
        return JSONResponse({"generators": infos[start:rest], "next": str(rest) if rest < len(infos) else None})

    async def one_generator(self, request: Request) -> Response:
        name = request.path_params["name"].partition("@")[0]
        if name not in self.generators:
            return error(404, "generator_not_found", f"The generator `{name}` does not exist.")
        if request.method == "DELETE":
            self.generators.remove(name)
            return Response(status_code=204)
        return JSONResponse(self.generator(name))

    async def synthesize(self, request: Request) -> Response:
        self.orders.append(await request.json())
        name, made = self.orders[-1]["name"], (b"{}", b"made")
        new = made not in self.versions.get(name, [])
        self.versions[name] = [made]
        told = {"sizes": {"recipe": 2048, "lora": 204_800, "generator": 1 << 20, "break_even": 6, "share": 0.01}}
        return JSONResponse(self.info(name, 1) | {"provenance": told}, status_code=201 if new else 200)

    def generator(self, name: str) -> dict[str, Any]:
        told = {
            "name": name,
            "version": 1,
            "digest": "a" * 64,
            "base": {"id": "tiny", "fingerprint": "f" * 64},
            "layout": {
                "modules": 4,
                "targets": ["q_proj"],
                "rank": {"min": 2, "max": 2},
                "numbers": 112,
                "dtype": "F32",
            },
            "tasks": ["law", "verse"],
            "condition": 64,
            "latent": 8,
            "parameters": 1000,
            "bytes": 4096,
            "created": "2026-11-22T10:00:00.000+00:00",
            "event": "train",
            "provenance": {"type": "train"},
            "losses": [{"epoch": 3, "reconstruction": 0.25, "kl": 1.5}],
            "sizes": {"recipe": 2048, "lora": 204_800, "generator": 4096, "break_even": 1},
            "warnings": [],
        }
        return GeneratorInfo.model_validate(told).model_dump(mode="json")

    async def job(self, request: Request) -> Response:
        assert request.path_params["id"] == "j1"
        return JSONResponse(self._job("generate" if "tasks" in self.orders[-1] else "merge"))

    def _job(self, kind: str = "merge") -> dict[str, Any]:
        state = self.states.pop(0)
        told = {"id": "j1", "kind": kind, "state": state, "progress": 0.5, "created": "", "finished": None}
        result = failed = None
        if state == "done" and kind == "generate":
            result = self.generator(self.orders[-1]["name"]) | {"new": True}
        elif state == "done":
            name = self.orders[-1]["name"]
            self.versions[name] = [*self.versions.get(name, []), (b"{}", b"merged")]
            result = {"name": name, "version": len(self.versions[name]), "digest": "0" * 64, "new": True}
        if state in ("failed", "cancelled"):
            failed = {"message": "It is too large.", "type": "Error", "param": None, "code": "rank_limit"}
        return JobInfo.model_validate(told | {"result": result, "error": failed}).model_dump(mode="json")

    def _compressed(self, name: str) -> dict[str, Any]:
        self.versions[name] = [*self.versions.get(name, []), (b"{}", b"small")]
        return self.info(name, len(self.versions[name])) | {"compression": TOLD, "module_errors": ERRORS, "new": True}

    def _hanging(self, weights: bytes) -> Response:
        def body() -> Iterator[bytes]:
            yield weights[:10]
            assert self.before_weights is not None
            self.before_weights.set()
            time.sleep(5)

        return StreamingResponse(body(), headers={"content-length": str(len(weights))})

    async def adapters(self, request: Request) -> Response:
        start = int(request.query_params.get("cursor", 0))
        names = sorted(self.versions)
        page = names[start : start + self.page_size]
        rest = start + self.page_size
        infos = [self.info(name, len(self.versions[name])) for name in page]
        return JSONResponse({"adapters": infos, "next": str(rest) if rest < len(names) else None})

    async def generate(self, request: Request) -> Response:
        self.prompts.append(await request.json())
        name = request.query_params.get("adapter")
        if name is not None and name not in self.versions:
            return JSONResponse({"error": "no such adapter", "error_type": "model_not_found"}, status_code=404)

        def frames() -> Iterator[str]:
            for event in self.events:
                yield f"data:{json.dumps(event)}\n\n"

        headers = {"X-Adapter": f"{name}@1", "X-Adapter-Digest": "0"} if name else {}
        return StreamingResponse(frames(), media_type="text/event-stream", headers=headers)

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"model_id": "tiny"})

    def app(self) -> Starlette:
        async def note(request: Request, handler: Any) -> Response:
            self.requests.append(f"{request.method} {request.url.path}?{request.url.query}".rstrip("?"))
            self.authorization.append(request.headers.get("authorization"))
            response: Response = self.refuse or await handler(request)
            return response

        def route(path: str, handler: Any, *methods: str) -> Route:
            async def endpoint(request: Request) -> Response:
                return await note(request, handler)

            return Route(path, endpoint, methods=list(methods))

        return Starlette(
            routes=[
                route("/adapters", self.adapters, "GET"),
                route("/adapters/{name}", self.push, "PUT"),
                route("/adapters/{name}", self.adapter, "GET", "DELETE"),
                route("/adapters/{name}/compress", self.compress, "POST"),
                route("/compress", self.compress_jointly, "POST"),
                route("/merge", self.merge, "POST"),
                route("/generators", self.train, "POST"),
                route("/generators", self.list_generators, "GET"),
                route("/generators/{name}", self.one_generator, "GET", "DELETE"),
                route("/generators/{name}/adapters", self.synthesize, "POST"),
                route("/jobs/{id}", self.job, "GET", "DELETE"),
                route("/adapters/{name}/files/{file}", self.adapter, "GET"),
                route("/generate_stream", self.generate, "POST"),
                route("/health", self.ready, "GET"),
                route("/ready", self.ready, "GET"),
                route("/info", self.ready, "GET"),
            ]
        )


@contextmanager
def running() -> Iterator[FakeServer]:
    """The server on a free port, in a thread."""
    fake = FakeServer()
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from now on a call waits for the server instead of failing
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(fake.app(), log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join(timeout=10)
