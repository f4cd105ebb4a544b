"""Milliseconds of one decode step, best of many: `python -m tests.bench.steps [--quantize int8] [--threads 2]`."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.build import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from server.model.quantize import CHOICES
from tests.bench.adapters import write_adapters
from tests.support.driver import CoreDriver

CONTEXT = 100  # tokens of each prompt


class Steps(CoreDriver):
    """The core alone: without the driver's check of integrity, which no server makes at every step."""

    def decode(self, rows: int, digests: list[str], steps: int) -> float:
        """Best milliseconds of a step in which `rows` requests get a token each; row i takes adapter i, if any."""
        for row in range(rows):
            prompt = tuple((position * 31 + row * 7 + rows) % 40_000 + 100 for position in range(CONTEXT))
            adapters = (WeightedAdapter(digests[row % len(digests)]),) if digests else ()
            sampling = SamplingParams(max_tokens=steps + 20, temperature=0, ignore_eos=True)
            self.add(GenerationRequest(f"{rows}-{len(digests)}-{row}", prompt, sampling, adapters))
        names = [name for name in self.outputs if name.startswith(f"{rows}-{len(digests)}-")]
        while not all(self.outputs[name] for name in names):
            self.step()
        best = float("inf")
        for _ in range(steps):
            start = time.perf_counter()
            self.core.step()
            best = min(best, time.perf_counter() - start)
        for name in names:
            self.abort(name)
        return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantize", default="none", choices=CHOICES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_base_model("smollm2", dtype=getattr(torch, options.dtype))
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    with tempfile.TemporaryDirectory() as scratch:
        digests = []
        for folder in write_adapters(Path(scratch), base.model):
            config = (folder / "adapter_config.json").read_bytes()
            digests.append(registry.add(folder.name, config, folder / "adapter_model.safetensors")[0].digest)
    driver = Steps(base, EngineLimits(), registry.load, options.quantize)
    for rows, adapters in ((1, 0), (8, 0), (16, 0), (8, 8)):
        milliseconds = driver.decode(rows, digests[:adapters], options.steps)
        print(f"{options.quantize}, {options.dtype}, {rows:2} rows, {adapters} adapters: {milliseconds:6.1f} ms")


if __name__ == "__main__":
    main()
