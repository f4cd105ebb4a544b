"""Random adapters as PEFT folders: zero-mean factors, B small enough that the text stays text."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.bench.workload import RANKS

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = ("q_proj", "v_proj")


def write_adapters(
    folder: Path,
    model: torch.nn.Module,
    count: int = 8,
    *,
    ranks: Sequence[int] = RANKS,
    targets: tuple[str, ...] = TARGETS,
    prefix: str = "a",
) -> Iterator[Path]:
    """Write PEFT folders a0, a1, ..., adapter i of rank `ranks[i % len(ranks)]`; yields each."""
    for index in range(count):
        rank = ranks[index % len(ranks)]
        random = torch.Generator().manual_seed(index)
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(targets):
                a = torch.randn(rank, module.in_features, generator=random) / module.in_features**0.5
                b = torch.randn(module.out_features, rank, generator=random) * 0.01
                tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(torch.bfloat16)
                tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(torch.bfloat16)
        target = folder / f"{prefix}{index}"
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(targets),
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        yield target
