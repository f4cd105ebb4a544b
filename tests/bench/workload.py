"""The workload "distinct-8": eight adapters of ranks 8 to 64 on all linears, prompts of about 85 tokens, 64 new."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (8, 16, 32, 64)
NEW_TOKENS = 64
SENTENCE = "The history of the city begins with a small settlement on the river. "


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: `concurrency` requests sent at once, request i using adapter i modulo `adapters`."""

    adapters: int
    concurrency: int

    @property
    def title(self) -> str:
        kind = "base" if not self.adapters else "1 adapter" if self.adapters == 1 else f"{self.adapters} distinct"
        return f"{kind}, {self.concurrency} at once"


CASES = tuple(Case(adapters, count) for adapters in (0, 1, 8) for count in (1, 8, 16) if adapters <= count)


def prompt(index: int) -> str:
    return f"{index} " + SENTENCE * 6


def adapter_name(case: Case, index: int) -> str | None:
    return f"a{index % case.adapters}" if case.adapters else None


def write_adapters(folder: Path, model: torch.nn.Module, count: int = 8) -> Iterator[Path]:
    """Write PEFT folders a0, a1, ...: zero-mean factors, B small enough that the text stays text; yields each."""
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        random = torch.Generator().manual_seed(index)
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS):
                a = torch.randn(rank, module.in_features, generator=random) / module.in_features**0.5
                b = torch.randn(module.out_features, rank, generator=random) * 0.01
                tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(torch.bfloat16)
                tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(torch.bfloat16)
        target = folder / f"a{index}"
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(TARGETS),
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        yield target
