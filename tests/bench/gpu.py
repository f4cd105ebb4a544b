"""Steps of a Llama-3.1-8B shape on a GPU, with adapters, beside PEFT: `python -m tests.bench.gpu`.

Weights are random, for a step's cost depends on shapes alone. Adapters are those of "distinct-8" over all linears.
"step" is what a server waits for, with scheduling and sampling; "graph" is the GPU's part of it, and "limit" the bytes
of weights and factors at the measured bandwidth of the memory.
"""

import argparse
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters_store.forms import AdapterWeights, Form, LowRank
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.base import BaseModel
from server.model.loader import describe
from tests.bench.adapters import TARGETS
from tests.bench.roofline import LLAMA, mixed, with_adapters
from tests.bench.steps import Steps
from tests.bench.workload import NEW_TOKENS, RANKS
from tests.support.models import tiny_tokenizer

GIB = 1 << 30
LIMITS = EngineLimits(
    kv_cache_memory=12 * GIB,
    adapter_memory=24 * GIB,
    host_adapter_memory=GIB,
    max_batch_tokens=2048,
    max_running=128,
    max_context=4096,
)
PROMPT = 85  # tokens


def random_model(layers: int) -> torch.nn.Module:
    """The shape of Llama-3.1-8B with random weights, bfloat16."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def loader(base: BaseModel) -> Callable[[str], AdapterWeights]:
    """Weights of the adapter of each digest, a number; of numbers that are equal modulo 4 the factors are the same."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }

    @cache
    def factors(rank: int) -> dict[str, tuple[Form, ...]]:
        def random(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, device="cuda") / math.sqrt(columns)).bfloat16().cpu()

        return {
            name: (LowRank(random(rank, inner), random(outer, rank), torch.full((rank,), 0.1)),)
            for name, (outer, inner) in shapes.items()
        }

    return lambda digest: AdapterWeights(digest, factors(RANKS[int(digest) % len(RANKS)]))


def bandwidth() -> float:
    """Bytes per second that the sum of a large tensor reads."""
    data = torch.ones(4 * GIB // 4, device="cuda")
    times = [timed_on_device(lambda: data.sum()) for _ in range(5)]
    return data.nbytes / min(times)


def timed_on_device(call: Callable[[], object], count: int = 1) -> float:
    """Seconds of one of `count` calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


class Gpu:
    """The core with a random model, its adapters and its captured graphs."""

    def __init__(self, layers: int) -> None:
        base = describe(random_model(layers), tiny_tokenizer(), "random/llama-8b-shape")
        self.steps = Steps(base, LIMITS, loader(base))
        self._numbers = itertools.count()

    def add(self, rows: int, adapters: list[str], prompt: int, new: int) -> list[str]:
        """Queue `rows` requests, row i with adapter i modulo their number, if any; returns their names."""
        names = []
        for row in range(rows):
            number = next(self._numbers)
            tokens = tuple((position * 31 + number * 7919) % 100_000 + 100 for position in range(prompt))
            sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
            used = (WeightedAdapter(adapters[row % len(adapters)]),) if adapters else ()
            names.append(f"r{number}")
            self.steps.add(GenerationRequest(names[-1], tokens, sampling, used))
        return names

    def all_at_work(self, names: list[str]) -> None:
        while not all(self.steps.outputs[name] for name in names):
            self.steps.step()

    def decode(self, rows: int, adapters: list[str], count: int) -> tuple[float, float]:
        """Median seconds of a step, and of its graph alone."""
        names = self.add(rows, adapters, PROMPT, 2 * count + 200)
        self.all_at_work(names)
        for _ in range(4):  # the second step of a size captures its graph
            self.steps.step()
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.steps.core.step()
            times.append(time.perf_counter() - start)
        replay = self.replay(rows, bool(adapters))
        graph = min(timed_on_device(replay, 20) for _ in range(3)) if replay else float("nan")
        for name in names:
            self.steps.abort(name)
        return statistics.median(times), graph

    def replay(self, rows: int, with_adapters: bool) -> Callable[[], object] | None:
        graphs = self.steps.core._runner._graphs
        assert graphs is not None
        size = graphs.size(rows, rows)
        return None if size is None else graphs._replays.get((size, with_adapters))

    def workload(self, rows: int, adapters: list[str]) -> float:
        """Output tokens per second of requests that come at once, prompts included."""
        start = time.perf_counter()
        names = self.add(rows, adapters, PROMPT, NEW_TOKENS)
        while self.steps.core.has_work:
            self.steps.step()
        seconds = time.perf_counter() - start
        assert all(len(self.steps.outputs[name]) >= NEW_TOKENS for name in names)
        return rows * NEW_TOKENS / seconds

    def prompts(self, adapters: list[str]) -> float:
        """Seconds of the step that reads 8 prompts of 256 tokens."""
        times = []
        for _ in range(4):
            names = self.add(8, adapters, 256, 1)
            start = time.perf_counter()
            self.all_at_work(names)
            times.append(time.perf_counter() - start)
        return min(times)


def profiled(call: Callable[[], object], most: int) -> list[tuple[str, int, float]]:
    """Kernels of a call: name, launches and milliseconds, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_time > 0:
            found[event.name].append(event.device_time / 1e3)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def peft_speed(model: torch.nn.Module, rows: int, adapters: int) -> float:
    """Output tokens per second of PEFT's mixed batch over the same work; the model is left with adapters in it."""
    import peft

    configs = [
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights=False)
        for rank in mixed(adapters)
    ]
    adapted = peft.PeftModel(model, configs[0], adapter_name="a0", autocast_adapter_dtype=False)
    for number, config in enumerate(configs[1:], 1):
        adapted.add_adapter(f"a{number}", config, autocast_adapter_dtype=False)
    adapted.eval()
    ids = torch.randint(100, 100_000, (rows, PROMPT), device="cuda")
    names = [f"a{row % adapters}" for row in range(rows)]
    best = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            adapted.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                adapter_names=names,
            )
        torch.cuda.synchronize()
        best = max(best, rows * NEW_TOKENS / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LLAMA.layers)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", type=int, default=0, help="kernels to list for each step")
    parser.add_argument("--peft", action="store_true")
    options = parser.parse_args()
    speed = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; memory reads {speed / 1e12:.2f} TB/s", flush=True
    )
    if options.peft:
        print(f"PEFT, 8 distinct: {peft_speed(random_model(options.layers), 8, 8):.0f} tokens/s", flush=True)
        torch.cuda.empty_cache()
    gpu = Gpu(options.layers)
    cases: list[tuple[str, int, list[str]]] = [
        *((f"base, {rows}", rows, []) for rows in (1, 8, 32, 128)),
        ("1 of rank 8, 8", 8, ["0"]),
        ("1 of rank 64, 8", 8, ["3"]),
        *((f"{rows} distinct", rows, [str(number) for number in range(rows)]) for rows in (8, 32, 128)),
    ]
    print(f"{'rows':18} {'step ms':>8} {'graph ms':>9} {'limit ms':>9} {'tokens/s':>9}")
    for name, rows, adapters in cases:
        step, graph = gpu.decode(rows, adapters, options.steps)
        ranks = [RANKS[int(adapter) % len(RANKS)] for adapter in adapters]
        limit = with_adapters(LLAMA, ranks, 2).bytes * options.layers / LLAMA.layers / speed
        tokens = gpu.workload(rows, adapters)
        line = f"{name:18} {step * 1e3:8.2f} {graph * 1e3:9.2f} {limit * 1e3:9.2f} {tokens:9.0f}"
        print(line, flush=True)
        replay = gpu.replay(rows, bool(adapters)) if options.profile else None
        for kernel, count, ms in profiled(replay, options.profile) if replay else ():
            print(f"    {ms:7.3f} ms {count:5} x {kernel[:110]}")
    for name, adapters in (("base", []), ("8 distinct", [str(number) for number in range(8)])):
        print(f"8 prompts of 256 tokens, {name}: {gpu.prompts(adapters) * 1e3:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
