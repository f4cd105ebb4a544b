"""A compressor that halves nothing: it stores the source's bytes under another name and tells made-up errors."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from adapters_store.compression.jointly import JointRecipe
from adapters_store.compression.recipe import Bounds, Recipe
from adapters_store.errors import CodedError
from adapters_store.info import AdapterInfo, AdapterRef
from tests.api.fake_registry import FakeRegistry

ERRORS = {"model.layers.0.self_attn.q_proj": 0.01}
TOLD: dict[str, Any] = {
    "dtype": "int8",
    "relative_error": 0.01,
    "worst_module": {"name": "model.layers.0.self_attn.q_proj", "relative_error": 0.01},
    "divergence": {"mean_kl": 0.001, "max_kl": 0.01, "same_greedy": 0.995, "positions": 120.0, "probe": "p"},
}


class FakeCompressor:
    """`orders` says what it was asked for; `failure` is raised by every call."""

    def __init__(self, registry: FakeRegistry) -> None:
        self.orders: list[dict[str, Any]] = []
        self.failure: CodedError | None = None
        self._registry = registry

    async def compress(
        self,
        source: AdapterRef,
        recipe: Recipe,
        bounds: Bounds,
        *,
        target: str | None = None,
        replace: bool = False,
        probe: Sequence[str] | None = None,
        tenant: str = "public",
    ) -> tuple[AdapterInfo, bool, dict[str, float]]:
        order = {"source": source.digest, "target": target, "replace": replace, "probe": probe}
        self.orders.append(order | asdict(recipe) | asdict(bounds))
        if self.failure is not None:
            raise self.failure
        name = target or source.name
        current = self._registry.current(name, tenant)
        if current is not None and current.event == "compress":
            return current, False, ERRORS
        made = self._registry.put(name, b"small", tenant)
        return self._told(made), True, ERRORS

    async def compress_jointly(
        self,
        sources: Sequence[AdapterRef],
        recipe: JointRecipe,
        bounds: Bounds,
        *,
        probe: Sequence[str] | None = None,
        tenant: str = "public",
    ) -> list[tuple[AdapterInfo, bool, dict[str, float]]]:
        order = {"sources": [source.digest for source in sources], "probe": probe}
        self.orders.append(order | asdict(recipe) | asdict(bounds))
        if self.failure is not None:
            raise self.failure
        made = [self._registry.put(source.name, b"small", tenant) for source in sources]
        return [(self._told(each), True, ERRORS) for each in made]

    def _told(self, made: AdapterInfo) -> AdapterInfo:
        info = replace(made, event="compress", compression=TOLD, provenance={"type": "compress"})
        self._registry.names[made.tenant, made.name][-1] = info
        return info
