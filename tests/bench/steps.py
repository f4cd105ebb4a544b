"""Milliseconds of a decode step, best and median: `python -m tests.bench.steps [--quantize int8] [--compile]`.

With `--compile` steps are eager and compiled in turns, so that both meet the same load.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.compute_threads import ComputeThreads, in_passing
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from server.model.quantize import CHOICES
from tests.bench.adapters import write_adapters
from tests.support.driver import CoreDriver

CONTEXT = 100  # tokens of each prompt


class Steps(CoreDriver):
    """The core alone: without the driver's check of integrity, which no server makes at every step."""

    def decode(self, rows: int, digests: list[str], steps: int) -> list[list[float]]:
        """Milliseconds of steps in which `rows` requests get a token each; row i takes adapter i, if any.

        One list, or with compiled layers two: eager, compiled.
        """
        for row in range(rows):
            prompt = tuple((position * 31 + row * 7 + rows) % 40_000 + 100 for position in range(CONTEXT))
            adapters = (WeightedAdapter(digests[row % len(digests)]),) if digests else ()
            sampling = SamplingParams(max_tokens=2 * steps + 20, temperature=0, ignore_eos=True)
            self.add(GenerationRequest(f"{rows}-{len(digests)}-{row}", prompt, sampling, adapters))
        names = [name for name in self.outputs if name.startswith(f"{rows}-{len(digests)}-")]
        while not all(self.outputs[name] for name in names):
            self.step()
        context = self.core._runner._context
        compiled = context.compiled
        kinds = [None] if compiled is None else [None, compiled]
        times: list[list[float]] = [[] for _ in kinds]
        for number in range(steps * len(kinds)):
            context.compiled = kinds[number % len(kinds)]
            start = time.perf_counter()
            self.core.step()
            times[number % len(kinds)].append((time.perf_counter() - start) * 1e3)
        context.compiled = compiled
        for name in names:
            self.abort(name)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantize", default="none", choices=CHOICES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threads = ComputeThreads()  # as in a server: or steps with adapters, which other threads load, take twice as long
    driver, digests = in_passing(lambda: _build(options))
    engine = threading.Thread(target=_run, args=(threads, driver, digests, options))
    engine.start()
    threads.confine_others()
    engine.join()


def _build(options: argparse.Namespace) -> tuple[Steps, list[str]]:
    base = load_base_model("smollm2", dtype=getattr(torch, options.dtype))
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    with tempfile.TemporaryDirectory() as scratch:
        digests = []
        for folder in write_adapters(Path(scratch), base.model):
            config = (folder / "adapter_config.json").read_bytes()
            digests.append(registry.add(folder.name, config, folder / "adapter_model.safetensors")[0].digest)
    return Steps(base, EngineLimits(), registry.load, options.quantize, compiling=options.compile), digests


def _run(threads: ComputeThreads, driver: Steps, digests: list[str], options: argparse.Namespace) -> None:
    threads.take()
    if driver.core.compiler is not None:
        start = time.perf_counter()
        driver.core.start()
        ready = driver.core.compiler.wait(600)
        print(f"layers {'compiled' if ready else 'not compiled'}, {time.perf_counter() - start:.1f} s")
    for rows, adapters in ((1, 0), (8, 0), (16, 0), (8, 1), (8, 8)):
        times = driver.decode(rows, digests[:adapters], options.steps)
        for kind, own in zip(("eager", "compiled"), times, strict=False):
            what = f"{options.quantize}, {options.dtype}, {rows:2} rows, {adapters} adapters, {kind:8}"
            print(f"{what}: best {min(own):6.1f} ms, median {statistics.median(own):6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
