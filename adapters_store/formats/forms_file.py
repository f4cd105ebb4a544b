"""Forms as they are, in one safetensors file: how an adapter is kept that no uploader's format can hold.

A tensor is called `<module>.<part>`. Of a low-rank delta: `a` [r, in], `b` [out, r] (float or int8), `d` float32 [r],
`bias` float32 [out]; of a replaced weight: `weight` [out, in], `weight_bias` float32 [out].
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.tensors import read as read_tensor
from adapters_store.forms import BaseSpec, Form, LowRank, ModuleSpec, ReplacedWeight
from adapters_store.limits import Limits
from adapters_store.safetensors_header import DTYPES, read_header

FORMS_FILE = "adapter_forms.safetensors"
Modules = Mapping[str, tuple[Form, ...]]
_DTYPES = {**DTYPES, "I8": torch.int8}


def dump(modules: Modules) -> bytes:
    """The file of these forms; equal forms give equal bytes."""
    tensors = {}
    for name, forms in modules.items():
        for form in forms:
            for part, tensor in _parts(form).items():
                tensors[f"{name}.{part}"] = tensor.contiguous()
    data: bytes = save(tensors, metadata={"format": "pt"})
    return data


def load(path: Path, base: BaseSpec, limits: Limits) -> dict[str, tuple[Form, ...]]:
    """The forms of a file, in memory of their own. Raises AdapterInvalid where they do not fit the base, or OSError."""
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    entries = read_header(path, limits.header, _DTYPES)
    with path.open("rb") as file:
        for entry in entries.values():
            module, _, part = entry.name.rpartition(".")
            parts[module][part] = read_tensor(file, entry)
    return {name: _forms(name, found, base.modules.get(name)) for name, found in parts.items()}


def facts(modules: Modules) -> dict[str, Any]:
    """What a manifest says of the forms: their names, ranks and how many numbers they hold."""
    forms = [form for found in modules.values() for form in found]
    lowrank = [form for form in forms if isinstance(form, LowRank)]
    ranks = [form.rank for form in lowrank] or [0]
    named = (("low_rank", lowrank), ("replaced_weight", len(forms) > len(lowrank)))
    acting = [tensor for form in forms for part, tensor in _parts(form).items() if part != "d"]
    return {
        "forms": [name for name, found in named if found],
        "rank": {"min": min(ranks), "max": max(ranks)},
        "parameters": sum(tensor.numel() for tensor in acting),
    }


def _parts(form: Form) -> dict[str, torch.Tensor]:
    if isinstance(form, LowRank):
        found = {"a": form.a, "b": form.b, "d": form.d, "bias": form.bias}
    else:
        found = {"weight": form.weight, "weight_bias": form.bias}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def _forms(name: str, parts: dict[str, torch.Tensor], spec: ModuleSpec | None) -> tuple[Form, ...]:
    forms: list[Form] = []
    if "weight" in parts:
        forms.append(ReplacedWeight(parts["weight"], parts.get("weight_bias")))
    if parts.keys() >= {"a", "b", "d"}:
        forms.append(LowRank(parts["a"], parts["b"], parts["d"], parts.get("bias")))
    known = [part for form in forms for part in _parts(form)]
    if spec is None or sorted(known) != sorted(parts) or not all(_fits(form, spec) for form in forms):
        raise AdapterInvalid(f"The stored forms of `{name}` do not fit the base.", code="shape_mismatch")
    return tuple(forms)


def _fits(form: Form, spec: ModuleSpec) -> bool:
    """Whether shapes and types are those that the kernels take without asking."""
    inputs, outputs = spec.in_features, spec.out_features
    biases = form.bias is None or (form.bias.shape == (outputs,) and form.bias.dtype == torch.float32)
    if isinstance(form, ReplacedWeight):
        return biases and form.weight.shape == (outputs, inputs) and form.weight.dtype != torch.int8
    factors = form.a.shape == (form.rank, inputs) and form.b.shape == (outputs, form.rank) and form.rank > 0
    scales = form.d.shape == (form.rank,) and form.d.dtype == torch.float32
    return biases and factors and scales and form.a.dtype == form.b.dtype
