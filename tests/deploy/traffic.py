"""Traffic of many kinds against a server on a tiny model: mixed adapters, base requests, refusals, a compression."""

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import random_lora
from tests.support.prometheus_server import PrometheusServer
from tests.support.redis_server import RedisServer
from tests.support.server_process import ServerProcess

ADAPTERS = 12
# Room for a few of the adapters on the device and in host memory, so that they come and go.
ROOM = ("--kv-cache-memory", "1MiB", "--adapter-memory", "256KiB", "--device-memory", "1280KiB")
SMALL = ("--no-compile", "--host-adapter-memory", "512KiB", "--max-batch-tokens", "64", "--log-level", "warning")
PROMPTS = (
    "the adapter answers",
    "one base model, many adapters, one batch",
    "the question of the request",
    "Whole blocks of the KV cache hold the long beginning of this prompt, and are found again.",
)
CLIENTS = 4


@contextmanager
def watched(folder: Path) -> Iterator[tuple[ServerProcess, PrometheusServer]]:
    """A server over `ADAPTERS` adapters and a Redis, and a Prometheus that scrapes it."""
    base, plain = save_tiny(folder / "base"), tiny_model("llama")
    for seed in range(ADAPTERS):
        random_lora(folder / "adapters" / f"adapter-{seed}", plain, seed, r=2 + seed, lora_alpha=8)
    options = ("--preload", str(folder / "adapters"), *ROOM, *SMALL)
    with (
        RedisServer(folder) as redis,
        ServerProcess(str(base), folder / "store", *options, "--redis", redis.url, log=folder / "server.log") as server,
        PrometheusServer(folder, server.url.removeprefix("http://")) as prometheus,
    ):
        yield server, prometheus


class Traffic:
    """Clients that ask on until the context is left; the first that gets an unexpected answer ends it with an error."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS + 2)
        self._running = [self._threads.submit(self._mixed, seed) for seed in range(CLIENTS)]
        self._running += [self._threads.submit(self._refused), self._threads.submit(self._alone)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True)
        if error is None:
            for client in self._running:
                client.result()

    def check(self) -> bool:
        """Raises what a client met; true otherwise."""
        for client in self._running:
            if client.done():
                client.result()
        return True

    def _mixed(self, seed: int) -> None:
        """One adapter a request, some much more often than others; every fifth request is the base's."""
        chosen = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            for number in itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count()):
                adapter = f"adapter-{int(ADAPTERS * chosen.random() ** 2)}"
                asked = {"model": adapter if number % 5 else "base", "prompt": chosen.choice(PROMPTS)}
                body = {**asked, "max_tokens": chosen.randint(2, 24), "temperature": 0}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text

    def _alone(self) -> None:
        """Steps of few rows, with adapters and without, by another route."""
        with httpx.Client(base_url=self._url, timeout=120) as client:
            for number in itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count()):
                query = "?adapter=adapter-0" if number % 2 else ""
                body = {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 12}}
                assert client.post(f"/generate{query}", json=body).status_code == 200

    def _refused(self) -> None:
        """Requests that fail: unknown, malformed, too long; and uploads of nothing, a few in a second."""
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.wait(0.2):
                assert client.post("/v1/completions", json={"model": "nobody", "prompt": "a"}).status_code == 404
                assert client.post("/v1/completions", json={"prompt": 7}).status_code == 400
                long = {"prompt": "a", "max_tokens": 10_000}
                assert client.post("/v1/completions", json=long).status_code == 400


def compress(url: str, names: Sequence[str]) -> None:
    """Each of these adapters gets a version of 8 bits."""
    for name in names:
        answer = httpx.post(
            f"{url}/adapters/{name}/compress", json={"dtype": "int8", "max_divergence": 10}, timeout=120
        )
        assert answer.status_code in (200, 201), answer.text
