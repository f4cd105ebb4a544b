"""`paged_attention`: causal attention over paged keys and values, and `paged_merge` of its partitions.

A program takes 16 rows or more: all query heads that share a KV head, of one or several queries of one request, so that
a key is read once for all of them. Keys come in partitions of a fixed length, counted from the request's first key;
each has a softmax of its own, and they are put together in order. Whether one program takes all partitions of its rows
or each has a program of its own is a matter of speed: the sums are the same. So a row's bits depend on its own keys
alone, not on its batch-mates nor on the pieces its prompt came in: a tile or a partition that a row does not see
multiplies by 1 and adds 0. Source: FlashAttention-2 (arXiv 2307.08691) section 3, Flash-Decoding for the partitions.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(
    tile: tl.tensor, query_start: tl.tensor, kv_length: tl.tensor, requests: tl.tensor, halvings: tl.tensor,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Request, flat row of its first query, queries of this tile from the request's first, their end, and the keys.

    Request `i` has the tiles from `query_start[i] // queries + i` on: enough for its queries, and known without a
    table. `halvings`: rounds of the search, the bits of `requests`.
    """
    queries: tl.constexpr = BLOCK_M // GROUP
    low, high = 0, requests - 1
    for _ in range(halvings):
        middle = (low + high + 1) // 2
        starts = tl.load(query_start + middle) // queries + middle <= tile
        low = tl.where(starts, middle, low)
        high = tl.where(starts, high, middle - 1)
    begin = tl.load(query_start + low)
    count = tl.load(query_start + low + 1) - begin
    first = (tile - begin // queries - low) * queries
    return low, begin, first, tl.minimum(first + queries, count), tl.load(kv_length + low) - count


@triton.jit
def merge(
    highest: tl.tensor, total: tl.tensor, acc: tl.tensor,
    other_highest: tl.tensor, other_total: tl.tensor, other_acc: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Two softmaxes as one: highest score (base 2) and sum of each row [M], weighted values [M, D]."""
    top = tl.maximum(highest, other_highest)
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen no key yet
    own, others = tl.exp2(highest - base), tl.exp2(other_highest - base)
    return top, total * own + other_total * others, acc * own[:, None] + other_acc * others[:, None]


@triton.jit
def _ratio(acc: tl.tensor, total: tl.tensor, live: tl.tensor) -> tl.tensor:
    return acc / tl.where(live, total, 1.0)[:, None]  # rows of the tile without a query have seen nothing


# fmt: off
@triton.jit
def _partition(
    q: tl.tensor, key_pool: tl.tensor, value_pool: tl.tensor, pages: tl.tensor, page_stride: tl.tensor,
    place_stride: tl.tensor, position: tl.tensor, start: tl.tensor, stop: tl.tensor, lowest: tl.tensor,
    window: tl.tensor, scale: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:
    # fmt: on
    """Softmax over the keys `start` to `stop`; those before `lowest` may have no page."""
    d = tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = (n >= lowest) & (n < stop)
        page = tl.load(pages + n // PAGE, mask=there, other=0).to(tl.int64)
        at = (page * page_stride + (n % PAGE) * place_stride)[:, None] + d[None, :]
        mask = there[:, None] & (d < DIM)[None, :]
        k = tl.load(key_pool + at, mask=mask, other=0.0)
        if q.dtype == k.dtype and q.dtype != tl.float32:
            score = tl.dot(q, tl.trans(k)) * scale
        else:
            score = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
        if CAPPED:
            score = softcap - 2.0 * softcap / (tl.exp2(score * (2.0 * LOG2E / softcap)) + 1.0)  # tanh, no overflow
        distance = position[:, None] - n[None, :]
        seen = there[None, :] & (distance >= 0) & (distance < window)
        score = tl.where(seen, score * LOG2E, float("-inf"))
        top = tl.maximum(highest, tl.max(score, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        probability = tl.exp2(score - base[:, None])
        shrunk = tl.exp2(highest - base)
        total = total * shrunk + tl.sum(probability, axis=1)
        v = tl.load(value_pool + at, mask=mask, other=0.0)
        if q.dtype == v.dtype and q.dtype != tl.float32:
            acc = tl.dot(probability.to(v.dtype), v, acc * shrunk[:, None])
        else:
            acc = tl.dot(probability, v.to(tl.float32), acc * shrunk[:, None], input_precision="ieee")
        highest = top
    return highest, total, acc


# fmt: off
@triton.jit(do_not_specialize=["requests", "halvings", "window", "tokens", "table_stride"])
def paged_attention(
    out: tl.tensor, state: tl.tensor, sums: tl.tensor, query: tl.tensor, query_stride: tl.tensor,
    head_stride: tl.tensor, key_pool: tl.tensor, value_pool: tl.tensor, page_stride: tl.tensor,
    place_stride: tl.tensor, kv_head_stride: tl.tensor, query_start: tl.tensor, kv_length: tl.tensor,
    block_table: tl.tensor, table_stride: tl.tensor, requests: tl.tensor, halvings: tl.tensor, tokens: tl.tensor,
    window: tl.tensor, scale: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
    PARTITION: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:
    # fmt: on
    """`out[t, h] = softmax(q K') V` over the keys that row t sees; grid (tiles, KV heads, partitions if SPLIT, else 1).

    out: [T, heads, DIM], contiguous. SPLIT: nothing is written there; partition p leaves its softmax in
    `state[p, t, h, :]` and `sums[p, t, h] = (highest score, sum)`, float32. Rows of no request are not touched.
    """
    kv_head = tl.program_id(1)
    request, begin, first, end, past = locate(
        tl.program_id(0), query_start, kv_length, requests, halvings, GROUP, BLOCK_M
    )
    if first >= end:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    own = first + m // GROUP
    live = (own < end) & (m < BLOCK_M // GROUP * GROUP)
    head = kv_head * GROUP + m % GROUP
    row = (begin + own).to(tl.int64)
    position = past + own
    mask = live[:, None] & (d < DIM)[None, :]
    q = tl.load(query + (row * query_stride + head * head_stride)[:, None] + d[None, :], mask=mask, other=0.0)
    stop, lowest = past + end, tl.maximum(past + first - window + 1, 0)
    keys, values = key_pool + kv_head * kv_head_stride, value_pool + kv_head * kv_head_stride
    pages = block_table + request.to(tl.int64) * table_stride
    aligned = lowest // BLOCK_N * BLOCK_N
    heads = tl.num_programs(1) * GROUP
    target = row * heads + head
    if SPLIT:
        part = tl.program_id(2)
        if (part * PARTITION >= stop) | ((part + 1) * PARTITION <= lowest):
            return
        highest, total, acc = _partition(
            q, keys, values, pages, page_stride, place_stride, position, tl.maximum(part * PARTITION, aligned),
            tl.minimum((part + 1) * PARTITION, stop), lowest, window, scale, softcap,
            CAPPED, PAGE, DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        target += heads.to(tl.int64) * tokens * part
        tl.store(state + target[:, None] * DIM + d[None, :], acc, mask=mask)
        tl.store(sums + target * 2, highest, mask=live)
        tl.store(sums + target * 2 + 1, total, mask=live)
    else:
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in range(lowest // PARTITION, tl.cdiv(stop, PARTITION)):
            part_highest, part_total, part_acc = _partition(
                q, keys, values, pages, page_stride, place_stride, position, tl.maximum(part * PARTITION, aligned),
                tl.minimum((part + 1) * PARTITION, stop), lowest, window, scale, softcap,
                CAPPED, PAGE, DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            highest, total, acc = merge(highest, total, acc, part_highest, part_total, part_acc)
        tl.store(out + target[:, None] * DIM + d[None, :], _ratio(acc, total, live).to(out.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit(do_not_specialize=["requests", "halvings", "window", "tokens"])
def paged_merge(
    out: tl.tensor, state: tl.tensor, sums: tl.tensor, query_start: tl.tensor, kv_length: tl.tensor,
    requests: tl.tensor, halvings: tl.tensor, tokens: tl.tensor, window: tl.tensor, PARTITION: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:
    # fmt: on
    """The partitions that `paged_attention` left, in order; grid (tiles, KV heads) as there."""
    _, begin, first, end, past = locate(tl.program_id(0), query_start, kv_length, requests, halvings, GROUP, BLOCK_M)
    if first >= end:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    own = first + m // GROUP
    live = (own < end) & (m < BLOCK_M // GROUP * GROUP)
    heads = tl.num_programs(1) * GROUP
    target = (begin + own).to(tl.int64) * heads + tl.program_id(1) * GROUP + m % GROUP
    mask = live[:, None] & (d < DIM)[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lowest, plane = tl.maximum(past + first - window + 1, 0), heads.to(tl.int64) * tokens
    for part in range(lowest // PARTITION, tl.cdiv(past + end, PARTITION)):
        at = part * plane + target
        part_highest = tl.load(sums + at * 2, mask=live, other=float("-inf"))
        part_total = tl.load(sums + at * 2 + 1, mask=live, other=0.0)
        part_acc = tl.load(state + at[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        highest, total, acc = merge(highest, total, acc, part_highest, part_total, part_acc)
    tl.store(out + target[:, None] * DIM + d[None, :], _ratio(acc, total, live).to(out.dtype.element_ty), mask=mask)
