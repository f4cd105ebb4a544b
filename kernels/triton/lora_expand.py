"""`lora_expand`: what the adapters add to every row, from `h` or, fused, from x itself."""

import triton
import triton.language as tl

from kernels.triton.factors import BIAS, DTYPE, RANK, ROWS, A, B, D, block, expand_block, pick, rank_scale, shrink_part


@triton.jit
def adds_nothing(record: tl.tensor) -> tl.tensor:
    """Whether an adapter leaves this module alone: then y is neither read nor written."""
    return (tl.load(record + RANK) <= 0) & (tl.load(record + BIAS) < 0)


# fmt: off
@triton.jit
def lora_expand(
    y0: tl.tensor, y1: tl.tensor, y2: tl.tensor, y0_stride: tl.tensor, y1_stride: tl.tensor, y2_stride: tl.tensor,
    outer0: tl.tensor, outer1: tl.tensor, outer2: tl.tensor, h: tl.tensor, x: tl.tensor, x_stride: tl.tensor,
    inner: tl.tensor, pool: tl.tensor, records0: tl.tensor, records1: tl.tensor, records2: tl.tensor,
    record_stride: tl.tensor, table: tl.tensor, slots: tl.tensor, tokens: tl.tensor, weights: tl.tensor,
    entries: tl.tensor, width: tl.tensor, FUSED: tl.constexpr, CORES: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FACTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:
    # fmt: on
    """`y[t] += w * (B (d * h) + bias)`, a row's adapters in segment order, in float32, rounded once.

    h: float32 [GROUP, entries, width], summed up, and with CORES as `lora_core` left it; FUSED: h is not read, each
    program computes what it needs of `A x` itself, with the same sums. Grid (chunks, tiles of BLOCK_N outputs, GROUP).
    A rank beyond `width`, which h cannot hold, gives NaN.
    """
    chunk, tile, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows, layers = tl.load(table + chunk * 3), tl.load(table + chunk * 3 + 1), tl.load(table + chunk * 3 + 2)
    outer, records = pick(member, outer0, outer1, outer2, GROUP), pick(member, records0, records1, records2, GROUP)
    if (rows == 0) | (tile * BLOCK_N >= outer):
        return
    if (layers == 1) & adds_nothing(records + tl.load(slots + first).to(tl.int64) * record_stride):
        return
    lane, live = tl.arange(0, ROWS), tl.arange(0, ROWS) < rows
    token = tl.load(tokens + first + lane, mask=live, other=0).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    stride = pick(member, y0_stride, y1_stride, y2_stride, GROUP)
    place = pick(member, y0, y1, y2, GROUP) + token[:, None] * stride + n[None, :]
    mask = live[:, None] & (n < outer)[None, :]
    y = tl.load(place, mask=mask, other=0.0)
    total = y.to(tl.float32)
    for layer in range(layers):
        entry = first + layer * rows
        record = records + tl.load(slots + entry).to(tl.int64) * record_stride
        rank, dtype = tl.load(record + RANK).to(tl.int32), tl.load(record + DTYPE)
        a, b, bias = tl.load(record + A), tl.load(record + B), tl.load(record + BIAS)
        d = block(pool, tl.load(record + D), tl.float32)
        delta = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for first_rank in range(0, rank, BLOCK_R):
            r = first_rank + tl.arange(0, BLOCK_R)
            if FUSED:
                product = tl.zeros([ROWS, BLOCK_R], tl.float32)
                for part in range(PARTS):
                    product += shrink_part(
                        x, token * x_stride, live, inner, pool, a, dtype, first_rank, rank, part,
                        PARTS, FACTORS, BLOCK_R, BLOCK_K,
                    )  # fmt: skip
            else:
                at = h + (member.to(tl.int64) * entries + entry + lane)[:, None] * width + r[None, :]
                product = tl.load(at, mask=live[:, None] & (r < tl.minimum(rank, width))[None, :], other=0.0)
            product *= rank_scale(record, d, r, rank, CORES)[None, :]
            delta = expand_block(
                delta, product, pool, b, dtype, first_rank, rank, n, outer, y.dtype != tl.float32, FACTORS, BLOCK_R
            )
        if bias >= 0:
            delta += tl.load(block(pool, bias, tl.float32) + n, mask=n < outer, other=0.0)[None, :]
        if not FUSED:
            delta = tl.where(rank > width, float("nan"), delta)
        if (rank > 0) | (bias >= 0):
            total += tl.load(weights + entry + lane, mask=live, other=0.0)[:, None] * delta
    tl.store(place, total.to(y.dtype), mask=mask)
