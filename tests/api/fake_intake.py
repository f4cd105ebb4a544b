"""An intake that tries nothing: it gives the upload to the registry, with a made-up proof."""

import asyncio
from dataclasses import replace as changed
from pathlib import Path

from adapters_store.info import AdapterInfo, BaseCheck, ModuleCount, Probe, Proof
from tests.api.fake_registry import FakeRegistry

PROOF = Proof(ModuleCount(2, 2), BaseCheck("name", "acme/tiny-base"), Probe(53, 1.5, 0.25))


class FakeIntake:
    """As `FakeRegistry.add`, in a thread, as the store's own."""

    def __init__(self, registry: FakeRegistry) -> None:
        self._registry = registry

    async def add(
        self,
        name: str,
        config: bytes,
        weights: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]:
        info, created = await asyncio.to_thread(
            self._registry.add, name, config, weights, tenant=tenant, if_match=if_match, replace=replace
        )
        if not created:
            return info, False
        proved = changed(info, proof=PROOF)
        self._registry.names[tenant, name][-1] = proved
        return proved, True
