"""Parts that the kernels share: reading a record, and the two products with a block of a factor.

A factor is read in the type it is stored in; where FACTORS names one type alone nothing is asked, for a branch keeps
loads from being started early. Which product follows depends on types alone, never on the batch:
- shrink: x and A of one half type, or int8 or 4-bit A (exact in either half type), on tensor cores; else in float32.
  The scale of a group of 4-bit numbers multiplies the group's own sum: a block of inputs lies within one group.
- expand into a half type: h, a float32, is split into two bfloat16 parts, 16 bits of mantissa, so that rounding h costs
  far less than rounding y. A float16 B is split the same way, exactly, and keeps its range; so is a 4-bit number times
  its scale, of 11 bits. Into float32: in float32.
"""

import triton
import triton.language as tl

from kernels.segments import INT4 as INT4_TYPE
from kernels.segments import INT4_GROUP, INT4_RUN, Field
from kernels.triton.chunks import ROWS as CHUNK_ROWS

A = tl.constexpr(int(Field.A))
B = tl.constexpr(int(Field.B))
D = tl.constexpr(int(Field.D))
BIAS = tl.constexpr(int(Field.BIAS))
RANK = tl.constexpr(int(Field.RANK))
DTYPE = tl.constexpr(int(Field.DTYPE))
CORE = tl.constexpr(int(Field.CORE))
ROWS = tl.constexpr(CHUNK_ROWS)
FLOAT32, BFLOAT16, FLOAT16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
INT4 = tl.constexpr(INT4_TYPE)
RUN, HALF_RUN, NUMBERS = tl.constexpr(INT4_RUN), tl.constexpr(INT4_RUN // 2), tl.constexpr(INT4_GROUP)


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
def rank_scale(record: tl.tensor, d: tl.tensor, r: tl.tensor, rank: tl.tensor, CORES: tl.constexpr) -> tl.tensor:
    """`d` of the ranks `r`; with CORES 1 where the record has a core, for `lora_core` has multiplied by it."""
    scale = tl.load(d + r, mask=r < rank, other=0.0)
    if CORES:
        scale = tl.where(tl.load(record + CORE) >= 0, 1.0, scale)
    return scale


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
        if FACTORS == 1 or dtype == FLOAT32:
            a = block(pool, offset, tl.float32)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 2:
        if FACTORS == 2 or dtype == BFLOAT16:
            a = block(pool, offset, tl.bfloat16)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 4:
        if FACTORS == 4 or dtype == FLOAT16:
            a = block(pool, offset, tl.float16)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 8:
        if FACTORS == 8 or dtype == INT8:
            a = block(pool, offset, tl.int8)
            h = _shrink(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
    if FACTORS & 16:
        if FACTORS == 16 or dtype == INT4:
            a = block(pool, offset, tl.uint8)
            h = _shrink_int4(h, x, x_row, live, inner, a, first_rank, rank, start, stop, BLOCK_R, BLOCK_K)
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
def _shrink_int4(
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
    tl.static_assert(NUMBERS % BLOCK_K == 0, "a block of inputs must lie within a group")
    r = first_rank + tl.arange(0, BLOCK_R)
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        rows = tl.load(x + x_row[:, None] + k[None, :], mask=live[:, None] & (k < inner)[None, :], other=0.0)
        numbers, place = int4_block(a, r, rank, k, inner)
        scale = tl.load(place + first // NUMBERS, mask=r < rank, other=0).to(tl.float32)
        if rows.dtype != tl.float32:
            product = tl.dot(rows, tl.trans(numbers.to(rows.dtype)))
        else:
            product = tl.dot(rows, tl.trans(numbers.to(tl.float32)), input_precision="ieee")
        h += product * scale[None, :]
    return h


@triton.jit
def int4_block(
    factor: tl.tensor, r: tl.tensor, rank: tl.tensor, k: tl.tensor, length: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Numbers -8 to 7 of the rank rows `r` at the places `k`, int8 [r, k], and where the scales of each row begin.

    factor: a block of `rank` rows of `length` numbers, as `kernels.reference.int4_values` says.
    """
    row_bytes, groups = (length + RUN - 1) // RUN * HALF_RUN, (length + NUMBERS - 1) // NUMBERS
    at = r[:, None] * row_bytes + (k // RUN * HALF_RUN + k % HALF_RUN)[None, :]
    byte = tl.load(factor + at, mask=(r < rank)[:, None] & (k < length)[None, :], other=0)
    shift = (k % RUN // HALF_RUN * 4).to(tl.uint8)
    return ((byte >> shift[None, :]) & 15).to(tl.int8) - 8, factor + rank * row_bytes + r * groups


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
        if FACTORS == 1 or dtype == FLOAT32:
            delta = _expand(delta, h, block(pool, offset, tl.float32), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 2:
        if FACTORS == 2 or dtype == BFLOAT16:
            delta = _expand(delta, h, block(pool, offset, tl.bfloat16), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 4:
        if FACTORS == 4 or dtype == FLOAT16:
            delta = _expand(delta, h, block(pool, offset, tl.float16), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 8:
        if FACTORS == 8 or dtype == INT8:
            delta = _expand(delta, h, block(pool, offset, tl.int8), first_rank, rank, n, outer, HALF, BLOCK_R)
    if FACTORS & 16:
        if FACTORS == 16 or dtype == INT4:
            b = block(pool, offset, tl.uint8)
            r = first_rank + tl.arange(0, BLOCK_R)
            numbers, place = int4_block(b, r, rank, n, outer)
            mask = (r < rank)[:, None] & (n < outer)[None, :]
            scale = tl.load(place[:, None] + (n // NUMBERS)[None, :], mask=mask, other=0)
            delta = _multiply(delta, h, numbers.to(tl.float32) * scale.to(tl.float32), HALF, HALF)
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
    return _multiply(delta, h, factor, HALF and factor.dtype != tl.float32, factor.dtype == tl.float16)


@triton.jit
def _multiply(
    delta: tl.tensor, h: tl.tensor, factor: tl.tensor, HALVES: tl.constexpr, SPLIT: tl.constexpr
) -> tl.tensor:
    """`delta + h factor`; HALVES: in two bfloat16 parts of h, and if SPLIT of the factor."""
    if HALVES:
        high = h.to(tl.bfloat16)
        low = (h - high.to(tl.float32)).to(tl.bfloat16)
        factor_high = factor.to(tl.bfloat16)
        if SPLIT:
            factor_low = (factor.to(tl.float32) - factor_high.to(tl.float32)).to(tl.bfloat16)
            delta = tl.dot(high, factor_low, delta)
        delta = tl.dot(low, factor_high, delta)
        delta = tl.dot(high, factor_high, delta)
    else:
        delta = tl.dot(h, factor.to(tl.float32), delta, input_precision="ieee")
    return delta
