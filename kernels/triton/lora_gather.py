"""`lora_gather`: the rows of an embedding's A that a step's tokens look up, in place of the shrink."""

import triton
import triton.language as tl

from kernels.triton.factors import BFLOAT16, DTYPE, FLOAT16, FLOAT32, INT8, RANK, A, block


@triton.jit
def lora_gather(
    h: tl.tensor,
    ids: tl.tensor,
    pool: tl.tensor,
    records: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """`h[e, :rank] = A[ids[token], :]`, A stored [vocabulary, r]; h: float32 [entries, width]. Grid (entries)."""
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + entry)
    if slot < 0:
        return
    record = records + slot.to(tl.int64) * record_stride
    rank, dtype, offset = tl.load(record + RANK).to(tl.int32), tl.load(record + DTYPE), tl.load(record + A)
    i = tl.arange(0, WIDTH)
    mask = i < tl.minimum(rank, width)
    at = tl.load(ids + tl.load(tokens + entry)) * rank + i
    row = tl.zeros([WIDTH], tl.float32)
    if dtype == FLOAT32:
        row = tl.load(block(pool, offset, tl.float32) + at, mask=mask, other=0.0)
    if dtype == BFLOAT16:
        row = tl.load(block(pool, offset, tl.bfloat16) + at, mask=mask, other=0.0).to(tl.float32)
    if dtype == FLOAT16:
        row = tl.load(block(pool, offset, tl.float16) + at, mask=mask, other=0.0).to(tl.float32)
    if dtype == INT8:
        row = tl.load(block(pool, offset, tl.int8) + at, mask=mask, other=0).to(tl.float32)
    tl.store(h + entry * width + i, row, mask=mask)
