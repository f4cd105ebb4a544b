"""Jobs of a kind that does what a test tells it."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.notes import Notes
from adapters_store.objects import Objects
from server.jobs.service import Jobs, Place, Progress

PATIENCE = 30  # seconds until a test that hangs is failed; no test waits for it


class FakeKind:
    """`finish` gives what the work told, with the order's `x`; `failure` is raised by the step of its name."""

    module = "tests.jobs.work"

    def __init__(self) -> None:
        self.failure: dict[str, Exception] = {}
        self.folders: list[Path] = []
        self.finishing = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.done: list[Any] = []
        self.prepared = 0.0  # told as progress by `prepare`

    async def prepare(self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        self.folders.append(folder)
        (folder / "given").write_text(str(order["x"]))
        progress(self.prepared)
        if "prepare" in self.failure:
            raise self.failure["prepare"]

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        self.finishing.set()
        await self.may_finish.wait()
        if "finish" in self.failure:
            raise self.failure["finish"]
        self.done.append((tenant, order["x"]))
        return {**told, "x": order["x"]}


class FakeWork:
    """The work without a process: it waits until `go` is set, if `held`; `crash` is raised."""

    def __init__(self, held: bool = False) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.crash: Exception | None = None
        self.running = 0
        self.most = 0
        if not held:
            self.go.set()

    async def __call__(
        self, module: str, folder: Path, order: Mapping[str, Any], progress: Callable[[float], None]
    ) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.set()
        try:
            progress(0.5)
            await self.go.wait()
            if self.crash is not None:
                raise self.crash
            return {"given": (folder / "given").read_text()}
        finally:
            self.running -= 1


def place(root: Path, objects: Objects | None = None, owner: str = "here:1") -> Place:
    found = objects or Objects(Bucket(MemoryStore()), shared=False, staging=root / "staging")
    return Place(Notes(found), owner, root / "room")


async def submit(jobs: Jobs, x: Any = 1, tenant: str = "public", key: str | None = None) -> Any:
    return await jobs.submit(tenant, "fake", {"x": x}, key or f"key-{x}")
