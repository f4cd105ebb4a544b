"""A tiny model, a set of very different adapters in a store, and the oracle for both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.model.base import BaseModel
from server.model.loader import load_base_model
from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import ALL_LINEAR, PeftOracle, random_lora

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain-4": {"r": 4, "lora_alpha": 8},
    "plain-16": {"r": 16, "lora_alpha": 16},
    "rank-1": {"r": 1, "lora_alpha": 4},
    "rslora-8": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "attention": {"r": 7, "lora_alpha": 21, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"layers.1.self_attn.q_proj": 9, "down_proj": 5},
        "alpha_pattern": {"layers.0.mlp.up_proj": 18},
    },
    "regex": {"r": 5, "lora_alpha": 10, "target_modules": r".*\.[02]\.(self_attn\.[qo]_proj|mlp\.\w+_proj)"},
    "layers": {"r": 6, "lora_alpha": 6, "layers_to_transform": [1]},
    "biased": {"r": 4, "lora_alpha": 12, "lora_bias": True},
    "ends": {"r": 4, "lora_alpha": 8, "target_modules": [*ALL_LINEAR, "embed_tokens", "lm_head"]},
    "own-head": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}


@dataclass(frozen=True)
class World:
    """folder: the model's; digests: adapter name -> digest in `registry`."""

    folder: Path
    registry: AdapterRegistry
    digests: dict[str, str]
    oracle: PeftOracle

    def base(self) -> BaseModel:
        """A fresh copy of the model: an engine changes the one it gets."""
        return load_base_model(str(self.folder), dtype=torch.float32)


def build_world(root: Path, architecture: str, adapters: dict[str, dict[str, Any]], **overrides: Any) -> World:
    """Train nothing, but save, upload and import everything as a user would."""
    folder = save_tiny(root / "base", architecture, **overrides)
    plain = tiny_model(architecture, **overrides)
    base = load_base_model(str(folder), dtype=torch.float32)
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    folders, digests = {}, {}
    for seed, (name, options) in enumerate(adapters.items()):
        folders[name] = random_lora(root / name, plain, seed, **options)
        config = (folders[name] / "adapter_config.json").read_bytes()
        info, created = registry.add(name, config, folders[name] / "adapter_model.safetensors")
        assert created
        digests[name] = info.digest
    return World(folder, registry, digests, PeftOracle(plain, folders))
