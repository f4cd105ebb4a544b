"""`lora_core`: what stands between shrink and expand: the sum of the parts, and a core where a basis is shared."""

import triton
import triton.language as tl

from kernels.triton.factors import CORE, RANK, D, block, pick

TILE = tl.constexpr(16)


@triton.jit
def lora_core(
    out: tl.tensor,
    h: tl.tensor,
    pool: tl.tensor,
    records0: tl.tensor,
    records1: tl.tensor,
    records2: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`out[member, e] = C (d * (sum of h's parts))`, or the sum alone where the record has no core.

    h: float32 [PARTS, GROUP, entries, width] of `lora_shrink`; out: float32 [1, GROUP, entries, width], of its own: a
    program reads all of a row of h for each number that it writes. WIDTH: a power of two, at least width. Grid
    (entries, GROUP). The expand leaves out `d` where there is a core. A sum runs over the ranks in tiles, in order.
    """
    entry, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + entry)
    if slot < 0:
        return
    record = pick(member, records0, records1, records2, GROUP) + slot.to(tl.int64) * record_stride
    rank, core = tl.load(record + RANK).to(tl.int32), tl.load(record + CORE)
    held = tl.minimum(rank, width)
    entries = tl.num_programs(0).to(tl.int64)
    own = (member * entries + entry) * width
    part_stride = GROUP * entries * width
    i = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    if core < 0:
        for part in tl.static_range(PARTS):  # unrolled, so that the loads do not wait for each other
            total += tl.load(h + part * part_stride + own + i, mask=i < held, other=0.0)
    else:
        d, c = block(pool, tl.load(record + D), tl.float32), block(pool, core, tl.float32)
        for start in range(0, held, TILE):
            q = start + tl.arange(0, TILE)
            product = tl.zeros([TILE], tl.float32)
            for part in range(PARTS):
                product += tl.load(h + part * part_stride + own + q, mask=q < held, other=0.0)
            product *= tl.load(d + q, mask=q < held, other=0.0)
            mask = (q < held)[:, None] & (i < held)[None, :]
            total += tl.sum(
                product[:, None] * tl.load(c + q[:, None] * rank + i[None, :], mask=mask, other=0.0), axis=0
            )
    tl.store(out + own + i, total, mask=i < held)
