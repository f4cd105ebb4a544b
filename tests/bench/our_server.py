"""This server as a user starts it: `polyrank serve` in a process of its own, asked over HTTP."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
import psutil

from tests.bench.client import Call, LoadClient, run_of
from tests.bench.peers.protocol import Request, Run
from tests.support.server_process import ServerProcess

COMPILE_SECONDS = 180


class OurServer:
    """Started on entry, stopped on exit. `preload`: the folder of PEFT folders that it registers at its start."""

    def __init__(self, name: str, model: str, scratch: Path, *options: str, preload: Path | None = None) -> None:
        folder = scratch / f"server-{name.replace(' ', '-')}"
        folder.mkdir(parents=True)
        self.name = name
        self.facts = {"version": "this checkout", "options": " ".join(options)}
        self.store = folder / "store"
        more = ["--preload", str(preload)] if preload else []
        self._process = ServerProcess(model, self.store, *options, *more, log=folder / "log")
        self._client = LoadClient(self._process.url)
        self._http = httpx.Client(base_url=self._process.url, trust_env=False, timeout=600)

    @property
    def url(self) -> str:
        return self._process.url

    def run(self, requests: Sequence[Request], at_once: int | None = None) -> Run:
        """All requests, at most `at_once` of them together; raises RuntimeError if a token is missing."""
        seconds, streams = self._client.run([self._call(request) for request in requests], at_once)
        for request, stream in zip(requests, streams, strict=True):
            if len(stream.times) != request.new_tokens:
                raise RuntimeError(f"{len(stream.times)} tokens came instead of {request.new_tokens}: {stream.last!r}")
        return run_of(seconds, sum(request.new_tokens for request in requests), [stream.times for stream in streams])

    def load(self, names: Sequence[str]) -> None:
        """Have every one of these adapters in memory, if there is room."""
        for name in names:
            self.run([Request("Load.", name, 1)])

    def counters(self) -> dict[str, float]:
        """The engine's own figures, by the names in `server/metrics.py` without `polyrank_`."""
        found = {}
        for line in self._http.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("polyrank_") and "{" not in name:
                found[name.removeprefix("polyrank_")] = float(value)
        return found

    def adapter_bytes(self, name: str) -> int:
        """Size of the adapter's weights as it was uploaded."""
        return int(self._http.get(f"/adapters/{name}").raise_for_status().json()["bytes"])

    def resident_memory(self) -> int:
        """Resident bytes of the server's process."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        self._client.close()
        self._http.close()
        self._process.__exit__(None, None, None)

    def __enter__(self) -> Self:
        try:
            self._process.start()
            self._await_compiled()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_compiled(self) -> None:
        """Until the layers are compiled, or until it is clear that they will not be."""
        deadline = time.monotonic() + COMPILE_SECONDS
        while self.counters()["compiling"] and time.monotonic() < deadline:
            time.sleep(0.2)  # nothing to wait on but the figure
        self.facts["compiled"] = "yes" if self.counters()["layers_compiled"] else "no"

    def _call(self, request: Request) -> Call:
        query = f"?adapter={quote(request.adapter)}" if request.adapter else ""
        parameters = {"max_new_tokens": request.new_tokens, "ignore_eos": True}
        return Call(f"/generate_stream{query}", {"inputs": request.prompt, "parameters": parameters})
