"""Forms as a PEFT folder: what anybody's PEFT loads, for adapters whose own file is none.

`d` goes into B, so that PEFT's scale alpha / r is 1; factors become float32, in which those of fewer bits, and the
product of a shared basis and a core, are exact to 24 bits.
"""

import json
import re
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.formats.forms_file import Modules
from adapters_store.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.forms import BaseSpec, Delta, ModuleSpec, ReplacedWeight

_PREFIX = "base_model.model."


def export(filename: str, modules: Modules, base: BaseSpec) -> bytes:
    """The bytes of `adapter_config.json` or `adapter_model.safetensors`. Raises KeyError for another name."""
    makers = {CONFIG_FILE: _config, WEIGHTS_FILE: _weights}
    return makers[filename](modules, base)


def _config(modules: Modules, base: BaseSpec) -> bytes:
    lowrank = _low_rank(modules)
    rank = max((form.rank for form in lowrank.values()), default=1)
    others = {re.escape(name): form.rank for name, form in lowrank.items() if form.rank != rank}
    saved = [name for name, forms in modules.items() if any(isinstance(form, ReplacedWeight) for form in forms)]
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(lowrank),
        "modules_to_save": saved or None,
        "lora_bias": any(form.bias is not None for form in lowrank.values()),
        "fan_in_fan_out": any(base.modules[name].kind == "conv1d" for name in lowrank),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return json.dumps(fields, indent=2).encode()


def _weights(modules: Modules, base: BaseSpec) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    biased = any(form.bias is not None for form in _low_rank(modules).values())
    for name, forms in modules.items():
        for form in forms:
            parts = _whole(form) if isinstance(form, ReplacedWeight) else _factors(form, base.modules[name], biased)
            tensors |= {f"{_PREFIX}{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    data: bytes = save(tensors, metadata={"format": "pt"})
    return data


def _factors(delta: Delta, spec: ModuleSpec, biased: bool) -> dict[str, torch.Tensor]:
    """PEFT multiplies an embedding's delta by the embedding's scale, which `d` holds already."""
    form = delta.widened()
    a, b = form.a.float(), (form.b.double() * (form.d.double() / spec.scale)).float()
    if spec.kind == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    if biased:
        parts["lora_B.bias"] = torch.zeros(spec.out_features) if form.bias is None else form.bias
    return parts


def _whole(form: ReplacedWeight) -> dict[str, torch.Tensor]:
    return {"weight": form.weight} | ({} if form.bias is None else {"bias": form.bias})


def _low_rank(modules: Modules) -> dict[str, Delta]:
    return {name: form for name, forms in modules.items() for form in forms if isinstance(form, Delta)}
