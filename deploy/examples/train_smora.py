"""Trains one SMoRA adapter for all example tasks together, and a plain LoRA of as many parameters on the same data.

`python -m deploy.examples.train_smora`, from the repository root; about eleven minutes on one core. It writes the SMoRA
adapter to `deploy/examples/smora/` and prints the held-out accuracy of both.

The module below computes what the authors' released code computes (arXiv 2501.15103, github.com/StyxXuan/smora), with
plain torch instead of their fork of PEFT.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .base import BASE_ID, greedy, load_base
from .tasks import TASKS, Item, Split, Task
from .train import Recipe, fit, optimise

FOLDER = Path(__file__).parent / "smora" / "seven-tasks"
LAYERS = list(range(18, 30))  # the last twelve: nothing is computed backwards below them
RANK, ACTIVE, PARTITION = 32, 4, 1
SCALE = 2.0  # alpha over the ranks in use; of both adapters
# The authors' 1e-5 moves a bias by less than 0.001 in so few steps, which no choice would notice.
BIAS_STEP = 1e-3
TARGETS = ["q_proj", "v_proj"]
# A router is as large as A, so a LoRA of as many parameters has half as many ranks again where in = out.
LORA_RANKS = {"q_proj": 48, "v_proj": 56}
STEPS, BATCH, RATE = 80, 16, 2e-3


class SMoRALinear(nn.Module):
    """`y = W x + (alpha / k) B (g(x) * (A x))`; g: the k largest of `sigmoid(R x) + bias`, over their sum, times k."""

    def __init__(self, base: nn.Linear, rank: int, active: int, scale: float) -> None:
        super().__init__()
        self.base, self.active, self.scale = base, active, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.lora_router = nn.Linear(base.in_features, rank, bias=False)
        self.lora_biases = nn.Parameter(torch.zeros(rank), requires_grad=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; in training the biases move by `BIAS_STEP` towards an equal use of all ranks."""
        scores = self.lora_router(x).sigmoid() + self.lora_biases
        largest, chosen = scores.topk(self.active, dim=-1)
        share = self.active * largest / largest.sum(-1, keepdim=True)
        gate = torch.zeros_like(scores).scatter(-1, chosen, share)
        if self.training:
            used = torch.bincount(chosen.flatten(), minlength=len(self.lora_biases)).float()
            with torch.no_grad():
                self.lora_biases.add_((used.mean() - used).sign(), alpha=BIAS_STEP)
        y: torch.Tensor = self.base(x) + self.scale * self.lora_B(gate * self.lora_A(x))
        return y


def mixture() -> Task:
    """All example tasks as one: an item is one of a task drawn at random."""

    def make(rng: random.Random, split: Split) -> Item:
        return TASKS[rng.choice(sorted(TASKS))].make(rng, split)

    return Task("seven-tasks", "All example tasks.", ".+", 48, make)


def wrap(model: nn.Module) -> dict[str, SMoRALinear]:
    """Puts a fresh `SMoRALinear` around the targets, in place; the rest is frozen. By module name."""
    model.requires_grad_(False)
    wrapped = {}
    for name, module in list(model.named_modules()):
        parts = name.split(".")
        if parts[-1] in TARGETS and int(parts[parts.index("layers") + 1]) in LAYERS:
            assert isinstance(module, nn.Linear)
            wrapped[name] = SMoRALinear(module, RANK, ACTIVE, SCALE)
            setattr(model.get_submodule(name.rpartition(".")[0]), parts[-1], wrapped[name])
    return wrapped


def save(modules: dict[str, SMoRALinear], folder: Path) -> int:
    """Writes the adapter as the authors' fork of PEFT would, in bf16 with float32 biases; returns bytes of weights."""
    tensors = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if key.startswith("lora_"):
                kept = value if key == "lora_biases" else value.to(torch.bfloat16)
                tensors[f"base_model.model.{name}.{key}"] = kept.contiguous()
    config = {
        "peft_type": "SRMOLE",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_ID,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": SCALE * ACTIVE,
        "activate_r": ACTIVE,
        "rank_partition": PARTITION,
        "epsilon_greedy": False,
        "dense_compute": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": TARGETS,
        "layers_to_transform": LAYERS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return weights.stat().st_size


def train_smora(task: Task, recipe: Recipe, seed: int, folder: Path) -> tuple[Any, Any, int]:
    """The base with a trained SMoRA adapter, which is also saved; the tokenizer; how many parameters it has."""
    model, tokenizer = load_base()
    torch.manual_seed(seed)
    modules = wrap(model)
    optimise(model, tokenizer, task, recipe, seed)
    print(f"{save(modules, folder)} bytes in {folder.name}", flush=True)
    return model, tokenizer, sum(p.numel() for m in modules.values() for k, p in m.named_parameters() if "lora_" in k)


def train_lora(task: Task, recipe: Recipe, seed: int) -> tuple[Any, Any, int]:
    """The base with a trained LoRA; the tokenizer; how many parameters it has."""
    model, tokenizer = load_base()
    model = fit(model, tokenizer, task, recipe, seed)
    return model, tokenizer, sum(p.numel() for p in model.parameters() if p.requires_grad)


def right(model: Any, tokenizer: Any, count: int, seed: int) -> dict[str, int]:
    """Exactly right answers to `count` held-out questions of each task; the adapter's factors are rounded to bf16."""
    for name, value in model.named_parameters():
        if "lora_" in name and "biases" not in name:
            value.data = value.data.to(torch.bfloat16).float()
    found = {}
    for task in TASKS.values():
        items = task.items("heldout", count, seed)
        texts = greedy(model, tokenizer, [item.prompt for item in items], task.max_new_tokens)
        found[task.name] = sum(task.correct(item, text) for item, text in zip(items, texts, strict=True))
        print(f"{task.name}: {found[task.name]} of {count}", flush=True)
    return found


def main() -> None:
    """Trains both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the SMoRA adapter")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=32, help="held-out questions per task")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same weights on each run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = mixture()
    lora = {
        "r": LORA_RANKS["q_proj"],
        "lora_alpha": SCALE * LORA_RANKS["q_proj"],
        "rank_pattern": {"v_proj": LORA_RANKS["v_proj"]},
        "alpha_pattern": {"v_proj": SCALE * LORA_RANKS["v_proj"]},
        "target_modules": TARGETS,
        "layers_to_transform": LAYERS,
    }
    recipe = Recipe(lora, steps=options.steps, batch=BATCH, rate=RATE, items=BATCH * options.steps)
    model, tokenizer, count = train_smora(task, recipe, options.seed, options.out)
    smora = right(model, tokenizer, options.items, options.seed + 1)
    model, tokenizer, lora_count = train_lora(task, recipe, options.seed)
    plain = right(model, tokenizer, options.items, options.seed + 1)
    print(f"| task | SMoRA, {count:,} parameters | LoRA, {lora_count:,} parameters |\n|---|---|---|")
    for name in [*TASKS, "all"]:
        of = options.items * (len(TASKS) if name == "all" else 1)
        both = (sum(found.values()) if name == "all" else found[name] for found in (smora, plain))
        print(f"| `{name}` | {' | '.join(f'{100 * n / of:.1f} %' for n in both)} |")


if __name__ == "__main__":
    main()
