"""`replace_weight`: rows whose adapter brings a weight of its own (a saved head) in place of the base's."""

import triton
import triton.language as tl

from kernels.segments import Field
from kernels.triton.factors import DTYPE, INT8, ROWS, block, shrink_part

WEIGHT = tl.constexpr(int(Field.WEIGHT))
WEIGHT_BIAS = tl.constexpr(int(Field.WEIGHT_BIAS))


@triton.jit
def replace_weight(
    y: tl.tensor,
    y_stride: tl.tensor,
    outer: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    inner: tl.tensor,
    pool: tl.tensor,
    records: tl.tensor,
    record_stride: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    FACTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """`y[t] = (1 - sum w) y[t] + sum w (W' x[t] + b')`, summed in float32 in segment order; grid (chunks, tiles).

    A tile is BLOCK_R outputs. Chunks without a replacement return at once. A weight in int8 or four bits, which has no
    scales, gives NaN.
    """
    chunk = tl.program_id(0)
    first, rows = tl.load(table + chunk * 3), tl.load(table + chunk * 3 + 1)
    layers = tl.load(table + chunk * 3 + 2)
    lane, live = tl.arange(0, ROWS), tl.arange(0, ROWS) < rows
    token = tl.load(tokens + first + lane, mask=live, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    own, keep, replaced = tl.zeros([ROWS, BLOCK_R], tl.float32), tl.full([ROWS], 1.0, tl.float32), 0
    for layer in range(tl.where(rows > 0, layers, 0)):
        entry = first + layer * rows
        record = records + tl.load(slots + entry).to(tl.int64) * record_stride
        offset, bias, dtype = tl.load(record + WEIGHT), tl.load(record + WEIGHT_BIAS), tl.load(record + DTYPE)
        if offset >= 0:
            product = shrink_part(
                x, token * x_stride, live, inner, pool, offset, dtype, tl.program_id(1) * BLOCK_R, outer, 0,
                1, FACTORS, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            product = tl.where(dtype >= INT8, float("nan"), product)
            if bias >= 0:
                product += tl.load(block(pool, bias, tl.float32) + n, mask=n < outer, other=0.0)[None, :]
            weight = tl.load(weights + entry + lane, mask=live, other=0.0)
            own += weight[:, None] * product
            keep -= weight
            replaced = 1
    if replaced == 1:
        place, mask = y + token[:, None] * y_stride + n[None, :], live[:, None] & (n < outer)[None, :]
        base = tl.load(place, mask=mask, other=0.0)
        kept = tl.where(keep[:, None] == 0.0, 0.0, keep[:, None] * base.to(tl.float32))  # NaN of the base goes too
        tl.store(place, (kept + own).to(base.dtype), mask=mask)
