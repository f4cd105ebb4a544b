"""This engine without HTTP: what the server's own work costs is the difference to the rows over HTTP."""

import argparse
import asyncio
import itertools
import time
from pathlib import Path

import torch

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_engine
from server.engine.compute_threads import in_passing
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from server.model.quantize import CHOICES
from tests.bench.peers.protocol import Peer, Request, Run, serve


class InProcess:
    """One engine with all adapters registered."""

    def __init__(self, model: str, adapters: Path, dtype: torch.dtype, quantize: str) -> None:
        self._digests: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count()
        self._engine: AsyncEngine = in_passing(lambda: self._build(model, adapters, dtype, quantize))
        self._loop.run_until_complete(self._start())
        while self._engine.stats().compiling:
            time.sleep(0.2)  # nothing to wait on but the figure

    def _build(self, model: str, adapters: Path, dtype: torch.dtype, quantize: str) -> AsyncEngine:
        base = load_base_model(model, dtype=dtype)
        registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
        for folder in sorted(adapters.iterdir()):
            config = (folder / "adapter_config.json").read_bytes()
            info, _ = registry.add(folder.name, config, folder / "adapter_model.safetensors")
            self._digests[folder.name] = info.digest
        return build_engine(base, EngineLimits(), registry.load, quantize, compiling=True)

    def run(self, requests: list[Request]) -> Run:
        return self._loop.run_until_complete(self._all(requests))

    async def _start(self) -> None:
        self._engine.start()

    async def _all(self, requests: list[Request]) -> Run:
        start = time.perf_counter()
        times = await asyncio.gather(*(self._one(request) for request in requests))
        seconds = time.perf_counter() - start
        gaps = [after - before for own in times for before, after in itertools.pairwise(own)]
        return Run(seconds, sum(map(len, times)), [own[0] - start for own in times], gaps)

    async def _one(self, request: Request) -> list[float]:
        generation = GenerationRequest(
            str(next(self._numbers)),
            request.prompt,
            SamplingParams(max_tokens=request.new_tokens, temperature=0, ignore_eos=True),
            (WeightedAdapter(self._digests[request.adapter]),) if request.adapter else (),
        )
        async with await self._engine.submit(generation) as stream:
            return [time.perf_counter() async for output in stream if output.token_id is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", default="none", choices=CHOICES)
    options = parser.parse_args()

    def start() -> Peer:
        engine = InProcess(options.base, options.adapters, getattr(torch, options.dtype), options.quantize)
        return engine.run, {"version": "this checkout", "weights": f"{options.quantize}, {options.dtype}"}

    serve(start)


if __name__ == "__main__":
    main()
