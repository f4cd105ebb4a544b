"""One run that measures this engine and PEFT side by side on the workload "distinct-8".

python -m tests.bench [--dtype float32] [--repeat 2] [--json results/bench.json]
"""

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch

from kernels import dispatch
from server.model.loader import load_base_model
from tests.bench.ours import PolyrankPeer
from tests.bench.peer_peft import PeftPeer
from tests.bench.workload import CASES, NEW_TOKENS, Case, write_adapters


class Peer(Protocol):
    name: str

    def run(self, case: Case) -> float: ...


def measure(peer: Peer, repeat: int) -> dict[str, float]:
    """Output tokens per second of each case, prefill included; the best of `repeat` after one warm run."""
    rates = {}
    for case in CASES:
        peer.run(case)
        seconds = min(peer.run(case) for _ in range(repeat))
        rates[case.title] = round(case.concurrency * NEW_TOKENS / seconds, 1)
        print(f"{peer.name:>10}  {case.title:<22} {rates[case.title]:8.1f} tok/s", flush=True)
    return rates


def facts(dtype: str) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "dtype": dtype,
        "kernels": dispatch.load("cpu"),
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    results: dict[str, Any] = {"facts": facts(args.dtype), "tokens_per_second": {}}
    with tempfile.TemporaryDirectory() as scratch:
        base = load_base_model(args.model, dtype=dtype)
        folders = list(write_adapters(Path(scratch), base.model))
        ours = PolyrankPeer(base, folders)
        results["tokens_per_second"]["polyrank"] = measure(ours, args.repeat)
        ours.close()
        plain = load_base_model(args.model, dtype=dtype)
        results["tokens_per_second"]["peft"] = measure(PeftPeer(plain.model, plain.tokenizer, folders), args.repeat)
    rates = results["tokens_per_second"]
    results["ratio_to_peft"] = {t: round(rates["polyrank"][t] / rates["peft"][t], 2) for t in rates["polyrank"]}
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
