"""What adapters take in PEFT's memory: one JSON line `{"parameters": bytes, "growth": bytes}`, each per adapter."""

import argparse
import gc
import json
from pathlib import Path

import peft
import psutil
import torch
from transformers import AutoModelForCausalLM


def measure(base: Path, adapters: Path, dtype: torch.dtype) -> dict[str, float]:
    """parameters: of the adapters; growth: of the process's resident memory from the first adapter on."""
    first, *others = sorted(adapters.iterdir())
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = peft.PeftModel.from_pretrained(bare, first, adapter_name=first.name)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for folder in others:
        model.load_adapter(folder, adapter_name=folder.name)
    gc.collect()
    growth = psutil.Process().memory_info().rss - before
    parameters = sum(each.nbytes for name, each in model.named_parameters() if ".lora_" in name)
    return {"parameters": parameters / (len(others) + 1), "growth": growth / len(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(json.dumps(measure(options.base, options.adapters, getattr(torch, options.dtype))))


if __name__ == "__main__":
    main()
