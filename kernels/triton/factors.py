"""Parts that the kernels share: reading a record, and the two products with a block of a factor.

A factor is read in the type it is stored in. Which product follows depends on types alone, never on the batch:
- shrink: x and A of one half type, or int8 A (exact in either half type), on tensor cores; else in float32.
- expand into a half type: h, a float32, is split into two bfloat16 parts, 16 bits of mantissa, so that rounding h costs
  far less than rounding y. A float16 B is split the same way, exactly, and keeps its range. Into float32: in float32.
"""

import triton
import triton.language as tl

from kernels.segments import Field
from kernels.triton.chunks import ROWS as CHUNK_ROWS

A = tl.constexpr(int(Field.A))
B = tl.constexpr(int(Field.B))
D = tl.constexpr(int(Field.D))
BIAS = tl.constexpr(int(Field.BIAS))
RANK = tl.constexpr(int(Field.RANK))
DTYPE = tl.constexpr(int(Field.DTYPE))
ROWS = tl.constexpr(CHUNK_ROWS)
FLOAT32, BFLOAT16, FLOAT16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def pick(index: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """The argument of this member of a group."""
    chosen = first
    if GROUP > 1:
        chosen = tl.where(index == 1, second, chosen)
    if GROUP > 2:
        chosen = tl.where(index == 2, third, chosen)
    return chosen


@triton.jit
def block(pool: tl.tensor, offset: tl.tensor, ELEMENT: tl.constexpr) -> tl.tensor:
    """Pointer to a block. Said of the typed pointer, `ALIGNMENT` makes loads 16 bytes wide, and asynchronous."""
    return tl.multiple_of((pool + offset).to(tl.pointer_type(ELEMENT)), 64)


@triton.jit
def shrink_part(
    x: tl.tensor,
    x_row: tl.tensor,
    live: tl.tensor,
    inner: tl.tensor,
    pool: tl.tensor,
    offset: tl.tensor,
    dtype: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
    part: tl.tensor,
    PARTS: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """`A x` of 16 rows and BLOCK_R ranks over one of PARTS pieces of the inputs; float32 [16, BLOCK_R]."""
    length = (inner + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    start = part * length
    stop = tl.minimum(start + length, inner)
    h = tl.zeros([ROWS, BLOCK_R], tl.float32)
    if FACTORS & 1:
        if dtype == FLOAT32:
            a = block(pool, offset, tl.float32)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 2:
        if dtype == BFLOAT16:
            a = block(pool, offset, tl.bfloat16)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 4:
        if dtype == FLOAT16:
            a = block(pool, offset, tl.float16)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 8:
        if dtype == INT8:
            a = block(pool, offset, tl.int8)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    return h


@triton.jit
def _shrink(
    h: tl.tensor,
    x: tl.tensor,
    x_row: tl.tensor,
    live: tl.tensor,
    inner: tl.tensor,
    a: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    r = first_rank + tl.arange(0, BLOCK_R)
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        within = (k < inner)[None, :]
        rows = tl.load(x + x_row[:, None] + k[None, :], mask=live[:, None] & within, other=0.0)
        factor = tl.load(a + r[:, None] * inner + k[None, :], mask=(r < rank)[:, None] & within, other=0.0)
        if rows.dtype != tl.float32 and (factor.dtype == rows.dtype or factor.dtype == tl.int8):
            h = tl.dot(rows, tl.trans(factor.to(rows.dtype)), h)
        else:
            h = tl.dot(rows.to(tl.float32), tl.trans(factor.to(tl.float32)), h, input_precision="ieee")
    return h


@triton.jit
def expand_block(
    delta: tl.tensor,
    h: tl.tensor,
    pool: tl.tensor,
    offset: tl.tensor,
    dtype: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
    n: tl.tensor,
    outer: tl.tensor,
    HALF: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """`delta + h B^T` for BLOCK_R ranks and the outputs `n`; h: float32 [16, BLOCK_R]; HALF: y is a half type."""
    if FACTORS & 1:
        if dtype == FLOAT32:
            delta = _expand(delta, h, block(pool, offset, tl.float32), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 2:
        if dtype == BFLOAT16:
            delta = _expand(delta, h, block(pool, offset, tl.bfloat16), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 4:
        if dtype == FLOAT16:
            delta = _expand(delta, h, block(pool, offset, tl.float16), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 8:
        if dtype == INT8:
            delta = _expand(delta, h, block(pool, offset, tl.int8), first_rank, rank, n, outer, HALF, BLOCK_R)
    return delta


@triton.jit
def _expand(
    delta: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
    n: tl.tensor,
    outer: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    r = first_rank + tl.arange(0, BLOCK_R)
    mask = (r < rank)[:, None] & (n < outer)[None, :]
    factor = tl.load(b + r[:, None] * outer + n[None, :], mask=mask, other=0.0)
    if HALF and factor.dtype != tl.float32:
        high = h.to(tl.bfloat16)
        low = (h - high.to(tl.float32)).to(tl.bfloat16)
        factor_high = factor.to(tl.bfloat16)
        if factor.dtype == tl.float16:
            factor_low = (factor.to(tl.float32) - factor_high.to(tl.float32)).to(tl.bfloat16)
            delta = tl.dot(high, factor_low, delta)
        delta = tl.dot(low, factor_high, delta)
        delta = tl.dot(high, factor_high, delta)
    else:
        delta = tl.dot(h, factor.to(tl.float32), delta, input_precision="ieee")
    return delta
