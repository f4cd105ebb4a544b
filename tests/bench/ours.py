"""This engine on the workload, in process."""

import asyncio
import time
from pathlib import Path
from typing import Any

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineLimits, build_engine
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from tests.bench.workload import NEW_TOKENS, Case, adapter_name, prompt


class PolyrankPeer:
    """One engine with all adapters registered; each case sends its requests at once."""

    name = "polyrank"

    def __init__(self, base: Any, folders: list[Path]) -> None:
        registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
        self._digests = {}
        for folder in folders:
            info, _ = registry.add(
                folder.name, (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors"
            )
            self._digests[folder.name] = info.digest
        self._loop = asyncio.new_event_loop()
        self._engine: AsyncEngine = build_engine(base, EngineLimits(), registry.load)
        self._runs = 0
        self._loop.run_until_complete(self._start())

    def run(self, case: Case) -> float:
        """Seconds for the whole case. A run number in each prompt keeps the prefix cache out of the figure."""
        self._runs += 1
        return self._loop.run_until_complete(self._case(case))

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.stop())
        self._loop.close()

    async def _start(self) -> None:
        self._engine.start()

    async def _case(self, case: Case) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(self._one(case, index) for index in range(case.concurrency)))
        return time.perf_counter() - start

    async def _one(self, case: Case, index: int) -> None:
        name = adapter_name(case, index)
        request = GenerationRequest(
            f"{self._runs}-{index}",
            f"{self._runs} {prompt(index)}",
            SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True),
            (WeightedAdapter(self._digests[name]),) if name else (),
        )
        async with await self._engine.submit(request) as stream:
            count = 0
            async for output in stream:
                count += output.token_id is not None
        if count != NEW_TOKENS:
            raise RuntimeError(f"{count} tokens came instead of {NEW_TOKENS}")
