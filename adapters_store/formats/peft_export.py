"""Forms as a PEFT folder: what anybody's PEFT loads, for adapters whose own file is none.

`d` goes into B, so that PEFT's scale alpha / r is 1; factors become float32, in which those of fewer bits, and the
product of a shared basis and a core, are exact to 24 bits. The file of weights, several times as large as the forms, is
made tensor by tensor while it is read.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.forms_file import FORMS_FILE, Modules, named
from adapters_store.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.forms import BaseSpec, Delta, Form, ModuleSpec, ReplacedWeight
from adapters_store.safetensors_header import DTYPES

_PREFIX = "base_model.model."
_EXPORTED = ("low_rank", "shared_basis", "replaced_weight")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export(filename: str, modules: Modules, base: BaseSpec) -> tuple[int, Iterator[bytes]]:
    """Size and bytes of `adapter_config.json` or `adapter_model.safetensors`. Raises KeyError for another name.

    Raises AdapterInvalid `feature_unsupported` for forms that a LoRA's files cannot hold.
    """
    others = [name for name in named(modules) if name not in _EXPORTED]
    if others:
        text = f"PEFT's files of a LoRA cannot hold {', '.join(others)}; download `{FORMS_FILE}`."
        raise AdapterInvalid(text, code="feature_unsupported")
    makers = {CONFIG_FILE: _config, WEIGHTS_FILE: _weights}
    return makers[filename](modules, base)


def _config(modules: Modules, base: BaseSpec) -> tuple[int, Iterator[bytes]]:
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
    data = json.dumps(fields, indent=2).encode()
    return len(data), iter([data])


def _weights(modules: Modules, base: BaseSpec) -> tuple[int, Iterator[bytes]]:
    """Every tensor is made twice, first for its shape alone; widest types come first, so that all are aligned."""
    biased = any(form.bias is not None for form in _low_rank(modules).values())
    places = [
        (-tensor.element_size(), name, part, _NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
        for name, forms in modules.items()
        for part, tensor in _parts(forms, base.modules[name], biased).items()
    ]
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, name, part, dtype, shape, size in sorted(places):
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        fields[f"{_PREFIX}{name}.{part}"] = entry
        end += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    header = text.ljust(-(-len(text) // 8) * 8)

    def pieces() -> Iterator[bytes]:
        yield len(header).to_bytes(8, "little") + header
        for _, name, part, *_ in sorted(places):
            tensor = _parts(modules[name], base.modules[name], biased)[part]
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return 8 + len(header) + end, pieces()


def _parts(forms: tuple[Form, ...], spec: ModuleSpec, biased: bool) -> dict[str, torch.Tensor]:
    parts: dict[str, torch.Tensor] = {}
    for form in forms:
        if isinstance(form, ReplacedWeight):
            parts |= _whole(form)
        elif isinstance(form, Delta):  # as are all others (`export`)
            parts |= _factors(form, spec, biased)
    return parts


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
