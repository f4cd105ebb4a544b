"""Several servers over one store, and clients that change and read it everywhere at once."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.history import Operation
from tests.support.server_process import ServerProcess

SMALL = ("--no-compile", "--kv-cache-memory", "8MiB", "--adapter-memory", "16MiB", "--log-level", "warning")
CONTENTS = 4
GENERATE = {"inputs": "the adapter", "parameters": {"max_new_tokens": 1}}


@contextmanager
def servers(count: int, base: Path, root: Path, *options: str) -> Iterator[list[ServerProcess]]:
    """Started at the same time, for most of it is importing, and stopped at the same time."""
    made = [
        ServerProcess(str(base), root / "store", *SMALL, *options, log=root / f"server-{number}.log")
        for number in range(count)
    ]
    with ThreadPoolExecutor(count) as threads:
        try:
            list(threads.map(lambda server: server.start(), made))
            yield made
        finally:
            list(threads.map(lambda server: server.__exit__(None, None, None), made))


class Clients:
    """Calls to the servers; each is kept in `operations`. folders: content `a0`, `a1`, ... -> PEFT folder."""

    def __init__(self, urls: Sequence[str], folders: Mapping[str, Path]) -> None:
        self._clients = [httpx.Client(base_url=url, timeout=60) for url in urls]
        self._folders = folders
        self.operations: list[Operation] = []  # appended to by several threads, which lists allow

    @property
    def count(self) -> int:
        return len(self._clients)

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def upload(self, server: int, name: str, content: str) -> httpx.Response | None:
        folder = self._folders[content]
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        return self._call(server, "upload", name, "PUT", f"/adapters/{name}?replace=true", files=files)

    def delete(self, server: int, name: str) -> httpx.Response | None:
        return self._call(server, "delete", name, "DELETE", f"/adapters/{name}")

    def rollback(self, server: int, name: str, version: int) -> httpx.Response | None:
        return self._call(server, "rollback", name, "POST", f"/adapters/{name}/rollback", json={"version": version})

    def read(self, server: int, name: str) -> httpx.Response | None:
        return self._call(server, "read", name, "GET", f"/adapters/{name}")

    def generate(self, server: int, name: str) -> httpx.Response | None:
        return self._call(server, "read", name, "POST", f"/generate?adapter={name}", json=GENERATE)

    def versions(self, server: int, name: str) -> list[dict[str, object]]:
        answer = self._clients[server].get(f"/adapters/{name}/versions")
        found = answer.json()["versions"] if answer.status_code == 200 else []
        return [{key: line[key] for key in ("version", "digest", "kind", "created")} for line in found]

    def mix(self, chance: random.Random, names: Sequence[str], count: int) -> None:
        """`count` calls, one after the other, anywhere; two in three read."""
        for _ in range(count):
            server, name = chance.randrange(len(self._clients)), chance.choice(names)
            kind = chance.choice(["upload", "upload", "delete", "rollback", *["read"] * 5, *["generate"] * 3])
            if kind == "upload":
                self.upload(server, name, f"a{chance.randrange(CONTENTS)}")
            elif kind == "rollback":
                self.rollback(server, name, chance.randint(1, 3))
            elif kind == "delete":
                self.delete(server, name)
            elif kind == "generate":
                self.generate(server, name)
            else:
                self.read(server, name)

    def _call(
        self, server: int, kind: str, name: str, method: str, path: str, **options: object
    ) -> httpx.Response | None:
        """None where the server died under it."""
        start = time.time()
        try:
            answer = self._clients[server].request(method, path, **options)  # type: ignore[arg-type]
        except httpx.TransportError:
            self.operations.append(Operation(server, kind, name, start, time.time(), lost=True))
            return None
        end = time.time()
        allowed = (200, 201, 204, 404) if kind != "delete" else (204, 404)
        assert answer.status_code in allowed, (server, kind, name, answer.status_code, answer.text)
        version, digest = _seen(answer)
        changed = answer.status_code in (201, 204)
        self.operations.append(Operation(server, kind, name, start, end, version, digest, changed=changed))
        return answer


def _seen(answer: httpx.Response) -> tuple[int | None, str]:
    """Version and digest of the answer: in its body, or in the headers of a generation."""
    if answer.status_code not in (200, 201):
        return None, ""
    if (named := answer.headers.get("X-Adapter")) is not None:
        return int(named.partition("@")[2]), answer.headers["X-Adapter-Digest"]
    body = answer.json()
    return body["version"], body["digest"]
