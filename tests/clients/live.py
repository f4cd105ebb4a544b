"""Starts a server on a free port: the API over the fake engine in a thread, or the whole service in a process."""

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from server.api.application import create_api
from server.api.services import ApiSettings, Services
from server.metrics import Metrics
from tests.api.fake_compressor import FakeCompressor
from tests.api.fake_engine import MODEL_ID, FakeEngine
from tests.api.fake_generation import fake_generation
from tests.api.fake_intake import FakeIntake
from tests.api.fake_merger import FakeMerger, fake_jobs
from tests.api.fake_registry import FakeRegistry
from tests.api.fake_replicas import FakeReplicas
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer
from tests.support.peft_oracle import random_lora
from tests.support.server_process import ServerProcess


@dataclass(frozen=True, slots=True)
class LiveServer:
    """Where the server is and what it holds: the base model's id and two adapters.

    folder: of the real one, with `base` and `adapters/NAME` as Hugging Face and PEFT read them.
    """

    base_url: str
    model: str
    adapters: tuple[str, str]
    folder: Path | None = None


@contextmanager
def fake_server() -> Iterator[LiveServer]:
    registry = FakeRegistry()
    registry.put("legal")
    registry.put("poet")
    with tempfile.TemporaryDirectory() as staging:
        settings = ApiSettings(staging=Path(staging))
        merger = FakeMerger(registry)
        api = create_api(
            Services(
                FakeEngine(),
                registry,
                FakeIntake(registry),
                FakeCompressor(registry),
                FakeReplicas(),
                Metrics(),
                settings,
                merger=merger,
                jobs=fake_jobs(merger, Path(staging)),
                **fake_generation(registry, Path(staging)),
            )
        )
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", MODEL_ID, ("legal", "poet"))
        finally:
            server.should_exit = True
            thread.join(10)
            listener.close()


@contextmanager
def real_server(root: Path) -> Iterator[LiveServer]:
    """A tiny model and two adapters, preloaded as a user would.

    The vocabulary is the tokenizer's: with an adapter lm-eval cuts all rows of the model that are beyond it.
    """
    shape = {"max_position_embeddings": 1024, "vocab_size": len(tiny_tokenizer())}
    model = tiny_model("llama", **shape)
    for seed, name in enumerate(("legal", "poet")):
        random_lora(root / "adapters" / name, model, seed, r=8, lora_alpha=32)
    base = save_tiny(root / "base", "llama", **shape)
    options = ("--preload", str(root / "adapters"), "--adapter-root", str(root / "adapters"))
    with ServerProcess(str(base), root / "store", "--no-compile", *options, log=root / "log") as server:
        identity = httpx.get(f"{server.url}/info").json()["model_id"]
        yield LiveServer(server.url, identity, ("legal", "poet"), root)
