"""SMoRA adapters as their authors' code writes them, and what it computes from them, written out."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

Tensors = dict[str, torch.Tensor]
TARGETS = ("q_proj", "v_proj", "down_proj")


def make(
    base: nn.Module,
    folder: Path,
    *,
    r: int = 8,
    activate_r: int = 3,
    rank_partition: int = 1,
    alpha: float = 6.0,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """Writes a folder with zero-mean random factors for every module of the base that ends in one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, module in base.named_modules():
        if not name.endswith(targets) or not isinstance(module, nn.Linear | Conv1D):
            continue
        outer, inner = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        stem = f"base_model.model.{name}"

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        tensors[f"{stem}.lora_A.weight"] = (random(r, inner) * inner**-0.5).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = (random(outer, r) * r**-0.5).to(dtype)
        tensors[f"{stem}.lora_router.weight"] = (random(r // rank_partition, inner) * inner**-0.5).to(dtype)
        tensors[f"{stem}.lora_biases"] = random(r) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "SRMOLE",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "activate_r": activate_r,
        "rank_partition": rank_partition,
        "epsilon_greedy": False,
        "dense_compute": False,
        "target_modules": list(targets),
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(tensors: Tensors, stem: str, config: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """What the adapter adds for one token. x: float32 [in]; returns float32 [out].

    z = sigmoid(R x), each score for `rank_partition` neighbours, plus the bias of the rank; the k largest, over their
    sum, times k, are the gates; the scale is alpha / k.
    """
    a, b, router = (tensors[f"{stem}.{part}.weight"].float() for part in ("lora_A", "lora_B", "lora_router"))
    active = config["activate_r"]
    scores = 1 / (1 + torch.exp(-(router @ x)))
    z = [float(scores[q // config["rank_partition"]] + tensors[f"{stem}.lora_biases"][q]) for q in range(len(a))]
    chosen = sorted(range(len(a)), key=lambda q: (-z[q], q))[:active]
    total = sum(z[q] for q in chosen)
    out = torch.zeros(len(b))
    for q in chosen:
        gate = active * z[q] / total
        out += config["lora_alpha"] / active * gate * float(a[q] @ x) * b[:, q]
    return out


def adapted(base: nn.Module, *weighted: tuple[Path, float]) -> Any:
    """A copy of the base with these adapters on it, each times its weight, token by token."""
    model = copy.deepcopy(base)
    for folder, weight in weighted:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        for stem in {name.split(".lora_")[0] for name in tensors}:
            module = model.get_submodule(stem.removeprefix("base_model.model."))
            module.register_forward_hook(_adding(tensors, stem, config, weight))
    return model


def _adding(tensors: Tensors, stem: str, config: dict[str, Any], weight: float) -> Any:
    def add(_: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        rows = [delta(tensors, stem, config, row) for row in x.reshape(-1, x.shape[-1])]
        return y + weight * torch.stack(rows).view(y.shape)

    return add
