"""`write_kv`: the keys and values of a step's rows into their pages, in one launch."""

import triton
import triton.language as tl


@triton.jit
def write_kv(
    key: tl.tensor,
    value: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    page_stride: tl.tensor,
    place_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows, pieces of BLOCK numbers of a row's `count`). A row in slot -1 is not stored."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    head, d = i // DIM, i % DIM
    at = slot // PAGE * page_stride + slot % PAGE * place_stride + head * kv_head_stride + d
    k = tl.load(key + row * key_stride + head * key_head_stride + d, mask=mask)
    v = tl.load(value + row * value_stride + head * value_head_stride + d, mask=mask)
    tl.store(key_pool + at, k.to(key_pool.dtype.element_ty), mask=mask)
    tl.store(value_pool + at, v.to(value_pool.dtype.element_ty), mask=mask)
