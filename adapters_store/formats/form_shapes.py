"""Whether a form's shapes, types and indices are those that the kernels take without asking."""

from collections.abc import Iterable

import torch

from adapters_store.forms import (
    BaseSpec,
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
from kernels import reference
from kernels.segments import FACTOR_DTYPES


def all_fit(name: str, forms: Iterable[Form], base: BaseSpec) -> bool:
    """Whether the base has a module or a norm of this name, on which these forms may stand."""
    spec, size = base.modules.get(name), base.norms.get(name)
    if spec is not None:
        return all(_fits(form, spec) for form in forms)
    return size is not None and all(isinstance(form, OutputScale) and _scale(form, size) for form in forms)


def _fits(form: Form, spec: ModuleSpec) -> bool:
    inputs, outputs = spec.in_features, spec.out_features
    match form:
        case ReplacedWeight(weight, bias):
            return weight.shape == (outputs, inputs) and weight.is_floating_point() and _maybe(bias, outputs)
        case LowRank(a, b, d, bias):
            return _factors(a, b, form.rank, spec) and _floats(d, (form.rank,)) and _maybe(bias, outputs)
        case GatedLowRank(a, b, d):
            factors = _factors(a, b, form.rank, spec) and _floats(d, (form.rank,)) and _maybe(form.bias, outputs)
            return factors and _gate(form, inputs) and spec.kind != "embedding"
        case SharedBasis(u, v, core, bias):
            cores = _floats(core, (form.rank,)) or _floats(core, (form.rank, form.rank))
            return _factors(v, u, form.rank, spec) and v.is_floating_point() and cores and _maybe(bias, outputs)
        case Int4LowRank(a, b, d, bias):
            rows = _four_bits(a, form.rank) and _four_bits(b, form.rank) and form.rank > 0
            return rows and _floats(d, (form.rank,)) and spec.kind != "embedding" and _maybe(bias, outputs)
        case Sparse():
            shape = (inputs, outputs) if spec.kind == "embedding" else (outputs, inputs)
            return _sparse(form, *shape)
        case Dense(weight, scale):
            return _dense(weight, outputs, inputs) and _floats(scale, (outputs,)) and spec.kind != "embedding"
        case InputTransform(blocks):
            return _blocks(blocks, inputs) and spec.kind != "embedding"
        case OutputScale():
            return _scale(form, outputs)


def _factors(a: torch.Tensor, b: torch.Tensor, rank: int, spec: ModuleSpec) -> bool:
    shapes = a.shape == (rank, spec.in_features) and b.shape == (spec.out_features, rank)
    return shapes and rank > 0 and a.dtype == b.dtype and a.dtype in FACTOR_DTYPES


def _gate(form: GatedLowRank, inputs: int) -> bool:
    router = form.router
    shaped = router.dim() == 2 and router.shape[1] == inputs and len(router) > 0 and form.rank % len(router) == 0
    ranks = _maybe(form.router_bias, form.rank) and 0 < form.active <= form.rank
    return shaped and router.is_floating_point() and router.dtype in FACTOR_DTYPES and ranks


def _four_bits(rows: Int4Rows, rank: int) -> bool:
    numbers, scales = reference.int4_row(rows.columns)
    shapes = rows.numbers.shape == (rank, numbers) and rows.scales.shape == (rank, scales)
    return shapes and rows.numbers.dtype == rows.scales.dtype == torch.uint8


def _sparse(form: Sparse, rows: int, columns: int) -> bool:
    start, column, value = form.start, form.column, form.value
    if start.dtype != torch.int32 or column.dtype != torch.int32 or start.shape != (rows + 1,) or column.dim() != 1:
        return False
    count = len(column)
    if not _floats(value, (count,)) or int(start[0]) != 0 or int(start[-1]) != count or bool((start.diff() < 0).any()):
        return False
    if not count:
        return True
    first = torch.zeros(count + 1, dtype=torch.bool)
    first[start.long()] = True  # of a row; between rows the columns may fall
    ascending = bool(((column.diff() > 0) | first[1:count]).all())
    return ascending and 0 <= int(column.min()) <= int(column.max()) < columns


def _dense(weight: torch.Tensor | SignRows, outputs: int, inputs: int) -> bool:
    if isinstance(weight, SignRows):
        shape = (outputs, -(-inputs // 8))
        return weight.columns == inputs and weight.bits.shape == shape and weight.bits.dtype == torch.uint8
    return weight.shape == (outputs, inputs) and weight.dtype in FACTOR_DTYPES


def _blocks(blocks: torch.Tensor, inputs: int) -> bool:
    size = blocks.shape[-1] if blocks.dim() == 3 else 0
    return size > 0 and inputs % size == 0 and _floats(blocks, (inputs // size, size, size))


def _scale(form: OutputScale, outputs: int) -> bool:
    vectors = all(_maybe(vector, outputs) for vector in (form.scale, form.bias, form.pair))
    return vectors and form.stride > 0 and (form.pair is None or outputs % (2 * form.stride) == 0)


def _maybe(vector: torch.Tensor | None, count: int) -> bool:
    return vector is None or _floats(vector, (count,))


def _floats(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.shape == shape and tensor.dtype == torch.float32
