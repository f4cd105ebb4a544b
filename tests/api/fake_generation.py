"""Generators in memory, trained by nobody, and adapters that nothing has made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.errors import CodedError
from adapters_store.generation.orders import TaskSpec, Wanted
from adapters_store.generators import GeneratorInfo, Generators
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.log import Log
from adapters_store.objects import Objects
from server.generator_trainer import TrainingPlan
from tests.adapters_store.generator_support import losses, write_generator
from tests.adapters_store.support import BASE
from tests.api.fake_registry import FakeRegistry


def memory_generators(root: Path) -> Generators:
    """The store's own, of the tests' base."""
    return Generators(Log(Objects(Bucket(MemoryStore()), shared=False, staging=root / "generators-staging")), BASE)


class FakeTrainer:
    """`plans` says what it was asked for; `refuse` is raised by `plan`, `failure` by the job; `stored` is there. What a
    job makes is the generator of a fixed seed."""

    module = "tests.api.fake_merger"

    def __init__(self, generators: Generators, root: Path) -> None:
        self.plans: list[dict[str, Any]] = []
        self.refuse: CodedError | None = None
        self.failure: CodedError | None = None
        self.stored: GeneratorInfo | None = None
        self._generators = generators
        self._root = root

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, str]],
        tasks: Mapping[str, TaskSpec],
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> TrainingPlan:
        told = [(source.digest, task) for source, task in sources]
        self.plans.append({"name": name, "sources": told, "tasks": dict(tasks), "settings": dict(given)})
        self.plans[-1] |= {"if_match": if_match, "replace": replace, "tenant": tenant}
        if self.refuse is not None:
            raise self.refuse
        return TrainingPlan({"name": name}, f"{told}{given}", self.stored)

    async def prepare(
        self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Callable[[float], None]
    ) -> None:
        if self.failure is not None:
            raise self.failure

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        path = write_generator(self._root)
        info, created = self._generators.add(order["name"], path, "train", {"type": "train"}, losses(), tenant=tenant)
        return {**asdict(info), "new": created}


class FakeSynthesizer:
    """`orders` says what it was asked for; `failure` is raised by every call."""

    def __init__(self, registry: FakeRegistry) -> None:
        self.orders: list[dict[str, Any]] = []
        self.failure: CodedError | None = None
        self._registry = registry

    async def synthesize(
        self,
        info: GeneratorInfo,
        name: str,
        wanted: Wanted,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]:
        self.orders.append({"generator": info.digest, "name": name, "wanted": wanted})
        self.orders[-1] |= {"if_match": if_match, "replace": replace, "tenant": tenant}
        if self.failure is not None:
            raise self.failure
        current = self._registry.current(name, tenant)
        return (current, False) if current is not None else (self._registry.put(name, b"made", tenant), True)


def fake_generation(registry: FakeRegistry, root: Path) -> dict[str, Any]:
    """Fields of `Services`."""
    generators = memory_generators(root)
    return {
        "generators": generators,
        "trainer": FakeTrainer(generators, root),
        "synthesizer": FakeSynthesizer(registry),
    }
