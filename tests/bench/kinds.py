"""What a row of each kind of adapter costs, beside a LoRA of rank 16 in the same run: `python -m tests.bench.kinds`.

The model is two random layers of the default model's widths in float32, eager; adapters act on all linears, with PEFT's
own defaults where the tests' table says nothing else. Time: of a decode step of 8 rows of one adapter less that of 8
base rows, median of the steps; the two alternate. Prints the table of tests/bench/README.md.
"""

import argparse
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters_store.forms import (
    AdapterWeights,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    Int4LowRank,
    LowRank,
    OutputScale,
    SharedBasis,
    Sparse,
)
from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.compute_threads import ComputeThreads, in_passing
from server.engine.limits import EngineLimits
from server.engine.packing import pack
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.base import BaseModel
from server.model.loader import load_base_model
from tests.adapters_store.formats.kinds.support import trained
from tests.support.driver import CoreDriver
from tests.support.models import VOCABULARY, save_tiny
from tests.support.peft_kinds import change, config, kinds

WIDTHS = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"lora": 16, "rslora": 16, "dora": 16, "alora": 16, "lokr": 16, "miss": 16, "hra": 16, "delora": 16, "vera": 64}
ROWS, CONTEXT = 8, 32
Added = tuple[str, Path, WeightedAdapter]  # kind, folder, how requests name it
BASELINE = "lora"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kind. file, resident: bytes; flops: multiplications and additions of a row; millis: of a row."""

    kind: str
    forms: str
    file: int
    resident: int
    flops: int
    millis: float


class Steps(CoreDriver):
    """Steps without the check of integrity, which no server makes at every step."""

    def __init__(self, base: BaseModel, registry: AdapterRegistry) -> None:
        super().__init__(base, EngineLimits(adapter_memory=2 << 30, kv_cache_memory=64 << 20), registry.load)
        self.load, self.embeddings = registry.load, base.spec.embeddings

    def decode(self, name: str, adapters: tuple[WeightedAdapter, ...], steps: int) -> list[float]:
        """Milliseconds of steps in which ROWS requests get a token each."""
        names = [f"{name}-{row}" for row in range(ROWS)]
        for row, request in enumerate(names):
            prompt = tuple((position * 31 + row * 7) % (VOCABULARY - 3) + 3 for position in range(CONTEXT))
            sampling = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
            self.add(GenerationRequest(request, prompt, sampling, adapters))
        while not all(self.outputs[request] for request in names):
            self.step()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.core.step()
            times.append((time.perf_counter() - start) * 1e3)
        for request in names:
            self.abort(request)
        return times


def flops(weights: AdapterWeights) -> int:
    """Of one row through every module that the adapter changes."""
    return sum(_flops(form) for forms in weights.modules.values() for form in forms)


def _flops(form: Form) -> int:
    match form:
        case LowRank(a, b) | Int4LowRank(a, b):
            rank = form.rank
            return 2 * rank * (_columns(a) + (b.shape[0] if isinstance(b, torch.Tensor) else b.columns))
        case SharedBasis(u, v, core):
            return 2 * form.rank * (u.shape[0] + v.shape[1]) + (0 if core.dim() == 1 else 2 * core.numel())
        case GatedLowRank():
            return 2 * form.a.numel() + 2 * form.router.numel() + 2 * form.active * form.b.shape[0]
        case Sparse():
            return 2 * len(form.value)
        case Dense(weight, scale):
            return 2 * len(scale) * _columns(weight)
        case InputTransform(blocks):
            return 2 * blocks.numel()
        case OutputScale():
            return 2 * sum(len(part) for part in (form.scale, form.bias, form.pair) if part is not None)
    return 0


def _columns(matrix: object) -> int:
    return matrix.shape[1] if isinstance(matrix, torch.Tensor) else int(matrix.columns)  # type: ignore[attr-defined]


def write(folder: Path) -> Iterable[tuple[str, Path]]:
    """An adapter of every kind; those that PEFT cannot make of this model are told and left out."""
    for number, kind in enumerate(kinds("llama")):
        options = {"r": RANKS[kind]} if kind in RANKS else {}
        adapter = config(kind, "llama", ALL, **options)
        try:
            trained("llama", adapter, folder / kind, seed=number, change=change, sizes=WIDTHS)
        except Exception as error:
            print(f"{kind}: {type(error).__name__}: {error}", flush=True)
            continue
        yield kind, folder / kind


def _measure(threads: ComputeThreads, driver: Steps, added: list[Added], costs: list[Cost]) -> None:
    threads.take()
    for kind, folder, adapter in added:
        mine: list[float] = []
        base: list[float] = []
        for turn in range(4):
            base += driver.decode(f"base-{kind}-{turn}", (), 15)
            mine += driver.decode(f"{kind}-{turn}", (adapter,), 15)
        weights = driver.load(adapter.digest)
        packed = pack(weights, driver.embeddings, 1 << 20)
        millis = (statistics.median(mine) - statistics.median(base)) / ROWS
        forms = sorted({type(form).__name__ for forms in weights.modules.values() for form in forms})
        size = (folder / "adapter_model.safetensors").stat().st_size
        costs.append(Cost(kind, ", ".join(forms) or "Context", size, packed.num_bytes, flops(weights), millis))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as scratch:
        threads = ComputeThreads()
        driver, added = in_passing(lambda: _build(Path(scratch)))
        engine = threading.Thread(target=_measure, args=(threads, driver, added, costs))
        engine.start()
        threads.confine_others()
        engine.join()
    unit = next(cost for cost in costs if cost.kind == BASELINE)
    print("| kind | forms | file, KB | on the device, KB | kFLOP a row | time of a row, LoRA 16 = 1 |")
    print("|---|---|---|---|---|---|")
    for cost in costs:
        size, resident, work = cost.file / 1e3, cost.resident / 1e3, cost.flops / 1e3
        relative = cost.millis / unit.millis
        print(f"| {cost.kind} | {cost.forms} | {size:.0f} | {resident:.0f} | {work:.0f} | {relative:.1f} |")
    print(f"LoRA of rank 16: {unit.millis * 1e3:.0f} us a row in two layers")


def _build(folder: Path) -> tuple[Steps, list[Added]]:
    save_tiny(folder / "base", "llama", **WIDTHS)
    base = load_base_model(str(folder / "base"), dtype=torch.float32)
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    added = []
    for kind, adapter in write(folder):
        config = (adapter / "adapter_config.json").read_bytes()
        info = registry.add(kind, config, adapter / "adapter_model.safetensors")[0]
        named = WeightedAdapter(info.digest, virtual_tokens=info.virtual_tokens, invocation=info.invocation)
        added.append((kind, adapter, named))
    return Steps(base, registry), added


if __name__ == "__main__":
    main()
