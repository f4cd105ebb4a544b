"""A merger whose plans need no adapters, and jobs that run its merges without a process."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.errors import CodedError
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.notes import Notes
from adapters_store.objects import Objects
from server.jobs.service import Jobs, Kind, Place, Progress
from server.merger import Plan
from tests.api.fake_registry import FakeRegistry


class FakeMerger:
    """`plans` says what it was asked for; `refuse` is raised by `plan`, `failure` by the job; `stored` is there."""

    module = "tests.api.fake_merger"

    def __init__(self, registry: FakeRegistry) -> None:
        self.plans: list[dict[str, Any]] = []
        self.refuse: CodedError | None = None
        self.failure: CodedError | None = None
        self.stored: AdapterInfo | None = None
        self._registry = registry

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, float]],
        method: str,
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> Plan:
        told = [(source.digest, weight) for source, weight in sources]
        self.plans.append({"name": name, "sources": told, "method": method, "parameters": dict(given)})
        self.plans[-1] |= {"if_match": if_match, "replace": replace}
        if self.refuse is not None:
            raise self.refuse
        return Plan({"name": name, "parameters": dict(given)}, f"{method}{told}{given}", self.stored)

    async def prepare(self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        if self.failure is not None:
            raise self.failure

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        info = self._registry.put(order["name"], b"merged", tenant)
        return {"name": info.name, "version": info.version, "digest": info.digest, "new": True}


async def no_work(
    module: str, folder: Path, order: Mapping[str, Any], progress: Callable[[float], None]
) -> dict[str, Any]:
    progress(0.5)
    return {}


def fake_jobs(merger: FakeMerger, root: Path, trainer: Kind | None = None) -> Jobs:
    """To be started on a loop."""
    notes = Notes(Objects(Bucket(MemoryStore()), shared=False, staging=root / "jobs-staging"))
    kinds: dict[str, Kind] = {"merge": merger} | ({"generate": trainer} if trainer is not None else {})
    return Jobs(kinds, Place(notes, "here:1", root / "jobs"), no_work)
