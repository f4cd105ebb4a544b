"""Forms as they are, in safetensors files: how an adapter is kept that no uploader's format can hold.

A tensor is called `<module>.<part>`. Of a low-rank delta: `a` [r, in], `b` [out, r] (float or int8), `d` float32 [r],
`bias` float32 [out]; in four bits, in place of `a` and `b`: `a4` [r, bytes], `a4_scales` [r, groups], `b4`,
`b4_scales` (B transposed), uint8; of a replaced weight: `weight` [out, in], `weight_bias` float32 [out]. Of a shared
basis: `core` float32 [r] or [r, r] and `bias`; its `u` [out, r] and `v` [r, in] lie in a file of their own, which is
the same for all adapters of the basis, and so is stored once.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.tensors import read as read_tensor
from adapters_store.forms import (
    BaseSpec,
    Delta,
    Form,
    Int4LowRank,
    Int4Rows,
    LowRank,
    ModuleSpec,
    ReplacedWeight,
    SharedBasis,
)
from adapters_store.limits import HeaderLimits, Limits
from adapters_store.safetensors_header import DTYPES, read_header
from kernels import reference

FORMS_FILE = "adapter_forms.safetensors"
BASIS_FILE = "adapter_basis.safetensors"
Modules = Mapping[str, tuple[Form, ...]]
_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
MAX_PARTS = 8  # tensors of a module
MAX_ENTRY_BYTES = 512  # of the header: a module's name, its shape and its place
_BASIS = ("u", "v")  # parts that lie in the basis file


def dump(modules: Modules) -> dict[str, bytes]:
    """The files of these forms by name; equal forms give equal bytes. Without a shared basis there is one file."""
    files: dict[str, dict[str, torch.Tensor]] = {FORMS_FILE: {}}
    for name, forms in modules.items():
        for form in forms:
            for part, tensor in _parts(form).items():
                file = files.setdefault(BASIS_FILE if part in _BASIS else FORMS_FILE, {})
                file[f"{name}.{part}"] = tensor.contiguous()
    return {file: save(tensors, metadata={"format": "pt"}) for file, tensors in files.items()}


def load(paths: Mapping[str, Path], base: BaseSpec, limits: Limits) -> dict[str, tuple[Form, ...]]:
    """The forms of `dump`'s files, in memory of their own; other files are not looked at.

    Raises AdapterInvalid where they do not fit the base, or OSError.
    """
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path in (paths[name] for name in (FORMS_FILE, BASIS_FILE) if name in paths):
        entries = read_header(path, _own_limits(base, limits.header), _DTYPES)
        with path.open("rb") as file:
            for entry in entries.values():
                module, _, part = entry.name.rpartition(".")
                parts[module][part] = read_tensor(file, entry)
    return {name: _forms(name, found, base.modules.get(name)) for name, found in parts.items()}


def _own_limits(base: BaseSpec, uploads: HeaderLimits) -> HeaderLimits:
    """Room for every part of every module, for the file is our own: the limits of uploads would end at 6,666 modules.

    A file of more than the base has room for is still refused.
    """
    tensors = max(uploads.tensors, MAX_PARTS * len(base.modules))
    return HeaderLimits(max(uploads.header_bytes, MAX_ENTRY_BYTES * tensors), tensors)


def facts(modules: Modules) -> dict[str, Any]:
    """What a manifest says of the forms: their names, ranks and how many numbers they hold, a shared basis left out."""
    forms = [form for found in modules.values() for form in found]
    ranks = [form.rank for form in forms if isinstance(form, Delta)] or [0]
    named = {"low_rank": LowRank | Int4LowRank, "shared_basis": SharedBasis, "replaced_weight": ReplacedWeight}
    return {
        "forms": [name for name, kind in named.items() if any(isinstance(form, kind) for form in forms)],
        "rank": {"min": min(ranks), "max": max(ranks)},
        "parameters": sum(_numbers(form) for form in forms),
    }


def _numbers(form: Form) -> int:
    if isinstance(form, Int4LowRank):
        return form.rank * (form.a.columns + form.b.columns) + (0 if form.bias is None else form.bias.numel())
    return sum(tensor.numel() for part, tensor in _parts(form).items() if part not in ("d", *_BASIS))


def _parts(form: Form) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None]
    match form:
        case LowRank():
            found = {"a": form.a, "b": form.b, "d": form.d, "bias": form.bias}
        case Int4LowRank(a, b):
            found = {"a4": a.numbers, "a4_scales": a.scales, "b4": b.numbers, "b4_scales": b.scales}
            found |= {"d": form.d, "bias": form.bias}
        case SharedBasis():
            found = {"u": form.u, "v": form.v, "core": form.core, "bias": form.bias}
        case ReplacedWeight():
            found = {"weight": form.weight, "weight_bias": form.bias}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def _forms(name: str, parts: dict[str, torch.Tensor], spec: ModuleSpec | None) -> tuple[Form, ...]:
    forms: list[Form] = []
    if "weight" in parts:
        forms.append(ReplacedWeight(parts["weight"], parts.get("weight_bias")))
    if parts.keys() >= {"a", "b", "d"}:
        forms.append(LowRank(parts["a"], parts["b"], parts["d"], parts.get("bias")))
    if parts.keys() >= {"a4", "a4_scales", "b4", "b4_scales", "d"} and spec is not None:
        a = Int4Rows(parts["a4"], parts["a4_scales"], spec.in_features)
        b = Int4Rows(parts["b4"], parts["b4_scales"], spec.out_features)
        forms.append(Int4LowRank(a, b, parts["d"], parts.get("bias")))
    if parts.keys() >= {"u", "v", "core"}:
        forms.append(SharedBasis(parts["u"], parts["v"], parts["core"], parts.get("bias")))
    known = [part for form in forms for part in _parts(form)]
    if spec is None or sorted(known) != sorted(parts) or not all(_fits(form, spec) for form in forms):
        raise AdapterInvalid(f"The stored forms of `{name}` do not fit the base.", code="shape_mismatch")
    return tuple(forms)


def _fits(form: Form, spec: ModuleSpec) -> bool:
    """Whether shapes and types are those that the kernels take without asking."""
    inputs, outputs = spec.in_features, spec.out_features
    if form.bias is not None and not _floats(form.bias, (outputs,)):
        return False
    match form:
        case ReplacedWeight(weight):
            return weight.shape == (outputs, inputs) and weight.is_floating_point()
        case LowRank(a, b, d):
            return _factors(a, b, form.rank, spec) and a.dtype != torch.uint8 and _floats(d, (form.rank,))
        case SharedBasis(u, v, core):
            cores = _floats(core, (form.rank,)) or _floats(core, (form.rank, form.rank))
            return _factors(v, u, form.rank, spec) and v.is_floating_point() and cores
        case Int4LowRank(a, b, d):
            rows = _four_bits(a, form.rank) and _four_bits(b, form.rank) and form.rank > 0
            return rows and _floats(d, (form.rank,)) and spec.kind != "embedding"


def _factors(a: torch.Tensor, b: torch.Tensor, rank: int, spec: ModuleSpec) -> bool:
    shapes = a.shape == (rank, spec.in_features) and b.shape == (spec.out_features, rank)
    return shapes and rank > 0 and a.dtype == b.dtype


def _four_bits(rows: Int4Rows, rank: int) -> bool:
    numbers, scales = reference.int4_row(rows.columns)
    shapes = rows.numbers.shape == (rank, numbers) and rows.scales.shape == (rank, scales)
    return shapes and rows.numbers.dtype == rows.scales.dtype == torch.uint8


def _floats(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.shape == shape and tensor.dtype == torch.float32
