"""What stands between the products of a decoder layer: `add_rms_norm`, `rotate`, `silu_mul`.

A program takes one row of the batch, or a piece of it: so its bits are its own. What transformers stores in the rows'
type between two operations is rounded to it here too.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """float32 as it comes back from memory of another type."""
    return value.to(TYPE).to(tl.float32)


@triton.jit
def add_rms_norm(
    out: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`reference_layer.add_rms_norm`; out, total: contiguous, total only with ADD. Grid (rows,), BLOCK >= size."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(x + row * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + i, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, x.dtype.element_ty)
        tl.store(total + row * size + i, value.to(total.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / size + eps)
    normed = rounded(value * scale, x.dtype.element_ty) * tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    rows: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    heads: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """`reference_layer.rotate`, in place. Grid (rows, pieces of HEADS heads); HALF: a power of two from DIM / 2 on."""
    row = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = d < DIM // 2
    mask = (head < heads)[:, None] & inside[None, :]
    at = rows + row * row_stride + head[:, None] * head_stride + d[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM + eps)
        low = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(weight + DIM // 2 + d, mask=inside, other=0.0).to(tl.float32)
        first = rounded(rounded(first * scale[:, None], rows.dtype.element_ty) * low[None, :], rows.dtype.element_ty)
        second = rounded(rounded(second * scale[:, None], rows.dtype.element_ty) * high[None, :], rows.dtype.element_ty)
    cos, sin = cos + row * cos_stride + d, sin + row * sin_stride + d
    cos_low = tl.load(cos, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + DIM // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + DIM // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = rounded(first * cos_low, rows.dtype.element_ty) - rounded(second * sin_low, rows.dtype.element_ty)
    high = rounded(second * cos_high, rows.dtype.element_ty) + rounded(first * sin_high, rows.dtype.element_ty)
    tl.store(at, low.to(rows.dtype.element_ty), mask=mask)
    tl.store(at + DIM // 2, high.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(
    out: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`reference_layer.silu_mul`; out: contiguous. Grid (rows, pieces of BLOCK numbers)."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    given = tl.load(gate + row * gate_stride + i, mask=mask, other=0.0).to(tl.float32)
    opened = rounded(given / (1.0 + tl.exp(-given)), gate.dtype.element_ty)
    value = opened * tl.load(up + row * up_stride + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, value.to(out.dtype.element_ty), mask=mask)
