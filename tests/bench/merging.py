"""`python -m tests.bench.merging`: time and peak memory of a merge of 8 adapters of rank 16 for Llama-3.1-8B.

Factors are random and bfloat16, shapes those of the model; nothing is downloaded. Each method runs in a process of its
own, on one thread, as the server runs it. `--layers N` takes the first N of 32 layers, for methods that hold dense
matrices: their memory does not depend on it, their time is proportional.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from adapters_store.forms import LowRank, ModuleSpec
from adapters_store.merging.methods import METHODS, merge
from adapters_store.merging.parts import Source

ADAPTERS, RANK, LAYERS = 8, 16, 32
WIDTH, KEYS, INNER = 4096, 1024, 14336
SHAPES = {  # in, out
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KEYS),
    "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}


def specs(layers: int) -> dict[str, ModuleSpec]:
    return {
        f"model.layers.{layer}.{name}": ModuleSpec("linear", *shape)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }


def source(seed: int, modules: dict[str, ModuleSpec]) -> Source:
    generator = torch.Generator().manual_seed(seed)
    forms = {}
    for name, spec in modules.items():
        a = torch.randn(RANK, spec.in_features, generator=generator) * spec.in_features**-0.5
        b = torch.randn(spec.out_features, RANK, generator=generator) * 0.05
        forms[name] = (LowRank(a.bfloat16(), b.bfloat16(), torch.full((RANK,), 2.0)),)
    return Source(forms, 1 / ADAPTERS)


def measure(method: str, mode: str | None, layers: int) -> dict[str, float]:
    """CPU seconds of the merge, on its one thread, whatever else the machine does; peak memory of the process, and
    what of it was there before the merge, in GiB."""
    torch.set_num_threads(1)
    modules = specs(layers)
    sources = [source(seed, modules) for seed in range(ADAPTERS)]
    before = peak()
    start = time.process_time()
    merge(sources, method, {"mode": mode} if mode else {}, modules)
    return {"seconds": time.process_time() - start, "peak_gib": peak(), "before_gib": before}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", default=[name for name in METHODS if name != "weight_search"])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--mode", choices=("corrected", "peft_exact"))
    parser.add_argument("--here", action="store_true", help="measure in this process, and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.methods[0], options.mode, options.layers)))
        return
    print(f"| method | CPU s, {options.layers} layers | peak RSS, GiB | of it the sources |\n|---|---|---|---|")
    for method in options.methods:
        command = [sys.executable, "-m", "tests.bench.merging", method, "--here", "--layers", str(options.layers)]
        command += ["--mode", options.mode] if options.mode else []
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {method} | {found['seconds']:.1f} | {found['peak_gib']:.2f} | {found['before_gib']:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
