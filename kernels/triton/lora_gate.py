"""`lora_gate`: the top-k gate of `GatedLowRank`, between shrink and expand."""

import triton
import triton.language as tl

from kernels.segments import GateField
from kernels.triton.factors import block

BIAS = tl.constexpr(int(GateField.BIAS))
ROUTER_ROWS = tl.constexpr(int(GateField.ROWS))
RANK = tl.constexpr(int(GateField.RANK))
ACTIVE = tl.constexpr(int(GateField.ACTIVE))
COUNTS = tl.constexpr(int(GateField.COUNTS))
TILE = tl.constexpr(16)


@triton.jit
def lora_gate(
    h: tl.tensor,
    scores: tl.tensor,
    pool: tl.tensor,
    gates: tl.tensor,
    gate_stride: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`h[0, e] = gate * (sum of h's parts)`, the gate from the parts of `router x`; 1 where the slot has none. Counts.

    h, scores: float32 [PARTS, entries, width] of `lora_shrink`; WIDTH: a power of two, at least width. Grid (entries).
    A rank's place among the scores is counted, not sorted: how many are larger, or equal and before it. So ties go to
    the lower index, in every batch.
    """
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + entry)
    if slot < 0:
        return
    record = gates + slot.to(tl.int64) * gate_stride
    router_rows, bias = tl.load(record + ROUTER_ROWS).to(tl.int32), tl.load(record + BIAS)
    i = tl.arange(0, WIDTH)
    part_stride = tl.num_programs(0).to(tl.int64) * width
    product = tl.zeros([WIDTH], tl.float32)
    for part in range(PARTS):
        product += tl.load(h + part * part_stride + entry * width + i, mask=i < width, other=0.0)
    if router_rows > 0:
        rank, active = tl.load(record + RANK).to(tl.int32), tl.load(record + ACTIVE).to(tl.int32)
        share = rank // router_rows
        own = scores + entry * width
        offsets = block(pool, bias, tl.float32)
        z = _scores(own, part_stride, offsets, bias, i, rank, share, PARTS, WIDTH)
        ahead = tl.zeros([WIDTH], tl.int32)
        for start in range(0, rank, TILE):
            j = start + tl.arange(0, TILE)
            other = _scores(own, part_stride, offsets, bias, j, rank, share, PARTS, TILE)[None, :]
            first = (other > z[:, None]) | ((other == z[:, None]) & (j[None, :] < i[:, None]))
            ahead += tl.sum((first & (j < rank)[None, :]).to(tl.int32), axis=1)
        used = (ahead < active) & (i < rank)
        chosen = tl.where(used, z, 0.0)
        product = tl.where(used, product * (chosen * active / tl.sum(chosen)), 0.0)
        counts = tl.load(record + COUNTS)
        if counts >= 0:
            tl.atomic_add(block(pool, counts, tl.int64) + i, 1, mask=used, sem="relaxed")
    tl.store(h + entry * width + i, product, mask=i < width)


@triton.jit
def _scores(
    scores: tl.tensor,
    part_stride: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    i: tl.tensor,
    rank: tl.tensor,
    share: tl.tensor,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([SIZE], tl.float32)
    for part in range(PARTS):
        total += tl.load(scores + part * part_stride + i // share, mask=i < rank, other=0.0)
    z = tl.sigmoid(total)
    if bias >= 0:
        z += tl.load(offsets + i, mask=i < rank, other=0.0)
    return z
