"""Forms as they are, in safetensors files: how an adapter is kept that no uploader's format can hold.

A tensor is called `<module>.<part>`. Of a low-rank delta: `a` [r, in], `b` [out, r] (float or int8), `d` float32 [r],
`bias` float32 [out]; in four bits, in place of `a` and `b`: `a4` [r, bytes], `a4_scales` [r, groups], `b4`,
`b4_scales` (B transposed), uint8; of a replaced weight: `weight` [out, in], `weight_bias` float32 [out]. Of a shared
basis: `core` float32 [r] or [r, r] and `bias`; its `u` [out, r] and `v` [r, in] lie in a file of their own, which is
the same for all adapters of the basis, and so is stored once.

Of a gated delta besides those of a low-rank one: `router` [rows, in], `router_bias` float32 [r], `active` int64 [1]. Of
a sparse delta: `sparse_start` int32, and unless it is empty `sparse_column` int32 and `sparse_value` float32. Of a
dense one: `dense` [out, in] or `dense_signs` uint8 [out, ceil(in / 8)], and `dense_scale` float32 [out]. Of an input's
transform: `blocks` float32 [in, size], one below the other. Of an output's scale: `stride` int64 [1], and `scale`,
`scale_bias`, `pair` float32 [out].
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.form_shapes import all_fit
from adapters_store.formats.tensors import read as read_tensor
from adapters_store.forms import (
    BaseSpec,
    Delta,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    Int4LowRank,
    Int4Rows,
    LowRank,
    ModuleSpec,
    OutputScale,
    ReplacedWeight,
    SharedBasis,
    SignRows,
    Sparse,
)
from adapters_store.limits import HeaderLimits, Limits
from adapters_store.safetensors_header import DTYPES, read_header

FORMS_FILE = "adapter_forms.safetensors"
BASIS_FILE = "adapter_basis.safetensors"
Modules = Mapping[str, tuple[Form, ...]]
_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
MAX_PARTS = 20  # tensors of a module
MAX_ENTRY_BYTES = 512  # of the header: a module's name, its shape and its place
_BASIS = ("u", "v")  # parts that lie in the basis file
_NAMED = {
    "low_rank": LowRank | Int4LowRank,
    "gated_low_rank": GatedLowRank,
    "shared_basis": SharedBasis,
    "sparse": Sparse,
    "dense": Dense,
    "input_transform": InputTransform,
    "output_scale": OutputScale,
    "replaced_weight": ReplacedWeight,
}
_NO_NUMBERS = {"d", "active", "stride", "sparse_start", "sparse_column", *_BASIS}  # they say where or how, not what


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
    return {name: _forms(name, found, base) for name, found in parts.items()}


def _own_limits(base: BaseSpec, uploads: HeaderLimits) -> HeaderLimits:
    """Room for every part of every module, for the file is our own: the limits of uploads would end at 6,666 modules.

    A file of more than the base has room for is still refused.
    """
    tensors = max(uploads.tensors, MAX_PARTS * (len(base.modules) + len(base.norms)))
    return HeaderLimits(max(uploads.header_bytes, MAX_ENTRY_BYTES * tensors), tensors)


def facts(modules: Modules) -> dict[str, Any]:
    """What a manifest says of the forms: their names, ranks and how many numbers they hold, a shared basis left out."""
    forms = [form for found in modules.values() for form in found]
    ranks = [form.rank for form in forms if isinstance(form, Delta | GatedLowRank)] or [0]
    return {
        "forms": named(modules),
        "rank": {"min": min(ranks), "max": max(ranks)},
        "parameters": sum(_numbers(form) for form in forms),
    }


def named(modules: Modules) -> list[str]:
    """Names of the forms that occur, as a manifest lists them."""
    forms = [form for found in modules.values() for form in found]
    return [name for name, kind in _NAMED.items() if any(isinstance(form, kind) for form in forms)]


def _numbers(form: Form) -> int:
    if isinstance(form, Int4LowRank):
        return form.rank * (form.a.columns + form.b.columns) + (0 if form.bias is None else form.bias.numel())
    if isinstance(form, Dense) and isinstance(form.weight, SignRows):
        return form.weight.columns * len(form.scale) + len(form.scale)
    return sum(tensor.numel() for part, tensor in _parts(form).items() if part not in _NO_NUMBERS)


def _parts(form: Form) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None]
    match form:
        case LowRank():
            found = {"a": form.a, "b": form.b, "d": form.d, "bias": form.bias}
        case GatedLowRank():
            found = {"a": form.a, "b": form.b, "d": form.d, "bias": form.bias}
            found |= {"router": form.router, "router_bias": form.router_bias, "active": torch.tensor([form.active])}
        case Int4LowRank(a, b):
            found = {"a4": a.numbers, "a4_scales": a.scales, "b4": b.numbers, "b4_scales": b.scales}
            found |= {"d": form.d, "bias": form.bias}
        case SharedBasis():
            found = {"u": form.u, "v": form.v, "core": form.core, "bias": form.bias}
        case Sparse(start, column, value):
            found = {"sparse_start": start, "sparse_column": column, "sparse_value": value}
        case Dense(weight, scale):
            whole = {"dense_signs": weight.bits} if isinstance(weight, SignRows) else {"dense": weight}
            found = {**whole, "dense_scale": scale}
        case InputTransform(blocks):
            found = {"blocks": blocks.flatten(0, 1)}
        case OutputScale(scale, bias, pair, stride):
            found = {"scale": scale, "scale_bias": bias, "pair": pair, "stride": torch.tensor([stride])}
        case ReplacedWeight():
            found = {"weight": form.weight, "weight_bias": form.bias}
    return {part: tensor for part, tensor in found.items() if tensor is not None and tensor.numel()}


def _forms(name: str, parts: dict[str, torch.Tensor], base: BaseSpec) -> tuple[Form, ...]:
    spec = base.modules.get(name)
    forms = [] if spec is None else [*_low_rank(parts, spec), *_others(parts, spec)]
    if "stride" in parts and parts["stride"].shape == (1,):
        bias, pair = parts.get("scale_bias"), parts.get("pair")
        forms.append(OutputScale(parts.get("scale"), bias, pair, int(parts["stride"])))
    known = [part for form in forms for part in _parts(form)]
    # Of factors it was seen when they were uploaded, and a second look would take as long as reading them.
    others = [form for form in forms if not isinstance(form, Delta | ReplacedWeight)]
    finite = all(bool(tensor.isfinite().all()) for form in others for tensor in _parts(form).values())
    if sorted(known) != sorted(parts) or not all_fit(name, forms, base) or not finite:
        raise AdapterInvalid(f"The stored forms of `{name}` do not fit the base.", code="shape_mismatch")
    return tuple(forms)


def _low_rank(parts: dict[str, torch.Tensor], spec: ModuleSpec) -> list[Form]:
    """What the parts of a low-rank delta make, of whatever kind."""
    forms: list[Form] = []
    d, bias = parts.get("d"), parts.get("bias")
    if d is not None and parts.keys() >= {"a", "b", "router", "active"} and parts["active"].shape == (1,):
        router, router_bias, active = parts["router"], parts.get("router_bias"), int(parts["active"])
        forms.append(GatedLowRank(parts["a"], parts["b"], d, router, router_bias, active, bias))
    elif d is not None and parts.keys() >= {"a", "b"}:
        forms.append(LowRank(parts["a"], parts["b"], d, bias))
    if d is not None and parts.keys() >= {"a4", "a4_scales", "b4", "b4_scales"}:
        a = Int4Rows(parts["a4"], parts["a4_scales"], spec.in_features)
        b = Int4Rows(parts["b4"], parts["b4_scales"], spec.out_features)
        forms.append(Int4LowRank(a, b, d, bias))
    if parts.keys() >= {"u", "v", "core"}:
        forms.append(SharedBasis(parts["u"], parts["v"], parts["core"], bias))
    return forms


def _others(parts: dict[str, torch.Tensor], spec: ModuleSpec) -> list[Form]:
    forms: list[Form] = []
    if "weight" in parts:
        forms.append(ReplacedWeight(parts["weight"], parts.get("weight_bias")))
    if "sparse_start" in parts:
        column = parts.get("sparse_column", torch.zeros(0, dtype=torch.int32))
        forms.append(Sparse(parts["sparse_start"], column, parts.get("sparse_value", torch.zeros(0))))
    if parts.keys() >= {"dense", "dense_scale"}:
        forms.append(Dense(parts["dense"], parts["dense_scale"]))
    if parts.keys() >= {"dense_signs", "dense_scale"}:
        forms.append(Dense(SignRows(parts["dense_signs"], spec.in_features), parts["dense_scale"]))
    blocks = parts.get("blocks")
    if blocks is not None and blocks.dim() == 2 and len(blocks) % blocks.shape[1] == 0:
        forms.append(InputTransform(blocks.view(-1, blocks.shape[1], blocks.shape[1])))
    return forms
