"""`lora_shrink`: the products `A x` of every entry of a step, in parts over the inputs."""

import triton
import triton.language as tl

from kernels.triton.factors import ROWS, pick, shrink_part


@triton.jit
def lora_shrink(
    h: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    inner: tl.tensor,
    pool: tl.tensor,
    records0: tl.tensor,
    records1: tl.tensor,
    records2: tl.tensor,
    record_stride: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    A_COLUMN: tl.constexpr,
    RANK_COLUMN: tl.constexpr,
    DTYPE_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """`h[part, member, entry, :rank] = A x[token]` over the part's inputs; the parts add up to `A x`.

    h: float32 [PARTS, GROUP, entries, width], what lies beyond an entry's rank is not written; grid (chunks, PARTS,
    GROUP). `d` is left to the expand: it multiplies the sum once, as the fused kernel does, so both give the same bits.
    Parts in buffers of their own, added up in order, instead of atomics: the same bits in every run.
    """
    chunk, part, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows = tl.load(table + chunk * 3), tl.load(table + chunk * 3 + 1)
    layers = tl.load(table + chunk * 3 + 2)
    if rows == 0:
        return
    lane = tl.arange(0, ROWS)
    live = lane < rows
    token = tl.load(tokens + first + lane, mask=live, other=0).to(tl.int64)
    records = pick(member, records0, records1, records2, GROUP)
    base = h + (part * GROUP + member).to(tl.int64) * entries * width
    for layer in range(layers):
        entry = first + layer * rows
        record = records + tl.load(slots + entry).to(tl.int64) * record_stride
        rank, dtype = tl.load(record + RANK_COLUMN), tl.load(record + DTYPE_COLUMN)
        rank = tl.minimum(rank, width).to(tl.int32)
        offset = tl.load(record + A_COLUMN)
        for first_rank in range(0, rank, BLOCK_R):
            product = shrink_part(
                x, token * x_stride, live, inner, pool, offset, dtype, first_rank, rank, part,
                PARTS, FACTORS, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            r = first_rank + tl.arange(0, BLOCK_R)
            place = base + (entry + lane).to(tl.int64)[:, None] * width + r[None, :]
            tl.store(place, product, mask=live[:, None] & (r < rank)[None, :])
