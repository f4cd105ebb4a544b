"""Plain torch meaning of every operation: the specification of all kernels. Allowed to be slow.

Sums run in float32 (float64 for float64 input) and are rounded once to the type of `y`.
"""

import torch

from kernels.segments import FACTOR_DTYPES, INT4, INT4_GROUP, INT4_RUN, Field, GateField, Segments

INT4_OFFSET = 8  # added to a number of four bits, which makes it unsigned
SMALLEST_ROW = 1e-30  # of `int8_rows`; far below any activation, far above where 127 / x overflows


def lowrank(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Add each row's low-rank deltas in place: `y[t] += w * (B (C (d * (A x[t]))) + bias)`; without a core C is 1.

    y: [T, out]; x: [T, in]; pool: uint8 [bytes]; records: int64 [slots, RECORD_FIELDS], one module's column.
    Rank 0 (or an adapter without this module) adds only its bias; rows outside `segments` stay as they are.
    Source: LoRA (arXiv 2106.09685) eq. 3, with the scale alpha / r folded into `d`; with C Compress then Serve (arXiv
    2407.00066), where A and B are the basis V^T and U of many adapters.
    """
    wide = _wide(y)
    total = y.to(wide, copy=True)
    for slot, rows, weight in _segments(segments):
        record = records[slot]
        h = None
        if rank := int(record[Field.RANK]):
            h = x[rows].to(wide) @ _block(pool, record, Field.A, (rank, x.shape[1])).to(wide).T
        _add(total, rows, weight, h, pool, record)
    return y.copy_(total)


def gated_lowrank(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    gates: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """Add gated low-rank deltas in place: `y[t] += w * (B (C (d * g * (A x[t]))) + bias)`, g = `lora_gate` of the row.

    As `lowrank`; gates: int64 [slots, GATE_FIELDS]. A slot without a gate (ROWS 0) has g = 1. Where a gate has COUNTS,
    every choice of a rank adds one there, in the pool.
    """
    wide = _wide(y)
    total = y.to(wide, copy=True)
    for slot, rows, weight in _segments(segments):
        record, gate = records[slot], gates[slot]
        h = None
        if rank := int(record[Field.RANK]):
            h = x[rows].to(wide) @ _block(pool, record, Field.A, (rank, x.shape[1])).to(wide).T
            if int(gate[GateField.ROWS]):
                g = lora_gate(x[rows], pool, gate)
                h = torch.where(g == 0, 0.0, h * g)  # an infinite h of a rank that is not in use does not matter
                _count(x[rows], pool, gate)
        _add(total, rows, weight, h, pool, record)
    return y.copy_(total)


def lora_gate(x: torch.Tensor, pool: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Factors of each rank, [T, r]: k times a rank's share of the k largest scores, 0 for the other ranks.

    x: [T, in]; gate: int64 [GATE_FIELDS]. Scores are `sigmoid(router x) + bias`, in float32; r / ROWS ranks share a row
    of the router. Equal scores: the lower rank goes first. The scale alpha / k is folded into `d`.
    Source: SMoRA (arXiv 2501.15103), as its authors' code computes it: the biased score is also the gate's value.
    """
    scores, ranks = _choose(x, pool, gate)
    chosen = torch.zeros_like(scores).scatter_(1, ranks, scores.gather(1, ranks))
    return int(gate[GateField.ACTIVE]) * chosen / chosen.sum(dim=1, keepdim=True)


def _choose(x: torch.Tensor, pool: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [T, r], and the ranks of the largest, int64 [T, k]."""
    wide = _wide(x)
    router_rows, rank, active = (int(gate[column]) for column in (GateField.ROWS, GateField.RANK, GateField.ACTIVE))
    dtype = FACTOR_DTYPES[int(gate[GateField.DTYPE])]
    count = router_rows * x.shape[1] * dtype.itemsize
    router = _slice(pool, "ROUTER", int(gate[GateField.ROUTER]), count).view(dtype).view(router_rows, x.shape[1])
    scores = (x.to(wide) @ router.to(wide).T).sigmoid().repeat_interleave(rank // router_rows, dim=1)
    if int(gate[GateField.BIAS]) >= 0:
        scores = scores + _slice(pool, "gate BIAS", int(gate[GateField.BIAS]), 4 * rank).view(torch.float32)
    return scores, scores.argsort(dim=1, descending=True, stable=True)[:, :active]


def _count(x: torch.Tensor, pool: torch.Tensor, gate: torch.Tensor) -> None:
    if int(gate[GateField.COUNTS]) >= 0:
        rank, (_, ranks) = int(gate[GateField.RANK]), _choose(x, pool, gate)
        counts = _slice(pool, "COUNTS", int(gate[GateField.COUNTS]), 8 * rank).view(torch.int64)
        counts += ranks.flatten().bincount(minlength=rank)


def lowrank_embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Add low-rank deltas of an embedding in place: `y[t] += w * (B (C (d * A[:, ids[t]])) + bias)`.

    y: [T, dim]; ids: int64 [T]; the A block is stored transposed, [vocabulary, r], never in four bits.
    """
    wide = _wide(y)
    total = y.to(wide, copy=True)
    for slot, rows, weight in _segments(segments):
        record = records[slot]
        h = None
        if rank := int(record[Field.RANK]):
            dtype = _dtype(record, "an embedding's A")
            row_bytes = rank * dtype.itemsize
            first_byte = int(record[Field.A]) + ids[rows][:, None] * row_bytes
            h = pool[first_byte + torch.arange(row_bytes, device=ids.device)].view(dtype).to(wide)
        _add(total, rows, weight, h, pool, record)
    return y.copy_(total)


def replace_weight(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Exchange the base product for the adapter's own weight, in place: `y[t] = (1 - sum w) y0 + sum w (W' x[t] + b')`.

    y: [T, out], on entry the base product y0 of these rows; x: [T, in]. One adapter of weight 1 leaves exactly
    `W' x + b'`, whatever y0 was. Adapters without a replacement leave their rows alone.
    """
    wide = _wide(y)
    keep = torch.ones(y.shape[0], dtype=wide, device=y.device)
    own = torch.zeros(y.shape, dtype=wide, device=y.device)
    for slot, rows, weight in _segments(segments):
        record = records[slot]
        if int(record[Field.WEIGHT]) < 0:
            continue
        if _dtype(record, "a replacement weight") is torch.int8:
            raise ValueError("a replacement weight of int8 would have no scales")
        product = x[rows].to(wide) @ _block(pool, record, Field.WEIGHT, (y.shape[1], x.shape[1])).to(wide).T
        if int(record[Field.WEIGHT_BIAS]) >= 0:
            product += _floats(pool, record, Field.WEIGHT_BIAS, y.shape[1])
        own.index_add_(0, rows, weight[:, None] * product)
        keep.index_add_(0, rows, -weight.to(wide))
    kept = torch.where(keep[:, None] == 0, 0.0, keep[:, None] * y.to(wide))
    return y.copy_(kept + own)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`y = x weight' + bias`; x: [T, in], weight: [out, in], bias: [out], of one floating type; y: [T, out]."""
    wide = _wide(x)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to int8 by its largest magnitude: int8 [T, in] and float32 scales [T], `x ~ values * scale`.

    Ties go to even. Magnitudes below `SMALLEST_ROW` count as that, so a row of zeros has a scale. A row with a NaN or
    an infinity gets zeros and the scale NaN: its result is NaN, and no other row's.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(len(x))  # NaN, if there is one
    finite = largest.isfinite()
    largest = largest.clamp(min=SMALLEST_ROW)
    inverse = largest.new_tensor(127.0) / largest  # a number over a tensor would be rounded twice
    values = (wide * inverse[:, None]).round()
    scale = torch.where(finite, largest / 127.0, torch.nan)
    return torch.where(finite[:, None], values, 0.0).to(torch.int8), scale


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`y = (x' weight') * scale * (the row's scale) + bias`, with x' the row in int8 and sums in int32; [T, out].

    x: [T, in], float32, bfloat16 or float16, as is y; weight: int8 [out, in]; scale, bias: float32 [out].
    Source: LLM.int8() (arXiv 2208.07339) section 2, vector-wise quantisation without the outlier columns.
    """
    values, row_scale = int8_rows(x)
    sums = values.int() @ weight.int().T
    y = sums.float() * scale * row_scale[:, None]
    return (y if bias is None else y + bias).to(x.dtype)


def int4_row(columns: int) -> tuple[int, int]:
    """Bytes of a row's numbers and of its scales."""
    return -(-columns // INT4_RUN) * INT4_RUN // 2, -(-columns // INT4_GROUP)


def int4_numbers(steps: torch.Tensor) -> torch.Tensor:
    """Whole numbers from -7 to 7, [rows, columns], in four bits each: uint8 [rows, bytes], rows filled up with zeros.

    Of 32 neighbours the first 16 are the low halves of 16 bytes and the others the high halves, so that a vector of
    bytes becomes two vectors of neighbours without moving any.
    """
    filled = torch.nn.functional.pad(steps, (0, -steps.shape[1] % INT4_RUN)) + INT4_OFFSET
    low, high = filled.to(torch.uint8).view(len(steps), -1, 2, INT4_RUN // 2).unbind(2)
    return (low | (high << 4)).flatten(1)


def int4_values(numbers: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    """A factor of four bits in float32 [rows, columns], exactly: number times the scale of its group.

    numbers: uint8 [rows, bytes] of `int4_numbers`; scales: uint8 [rows, groups of 64], whole, for what makes them
    small enough stands in `d`. A block in the pool is all numbers, then all scales.
    """
    halves = torch.stack([numbers & 15, numbers >> 4], dim=1).view(len(numbers), 2, -1, INT4_RUN // 2)
    steps = halves.transpose(1, 2).flatten(1)[:, :columns].float() - INT4_OFFSET
    return steps * scales.float().repeat_interleave(INT4_GROUP, dim=1)[:, :columns]


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store each token's key and value in its slot of the paged pool.

    key, value: [T, kv_heads, dim]; pools: [pages, page_size, kv_heads, dim] (any page stride);
    slots: int64 [T], distinct, `page * page_size + position in page`; a token in slot -1 is not stored (rows that pad
    a captured step; the door takes them on a GPU only).
    """
    stored = slots >= 0
    page_size, slots = key_pool.shape[1], slots[stored]
    page, position = slots // page_size, slots % page_size
    key_pool[page, position] = key[stored].to(key_pool.dtype)
    value_pool[page, position] = value[stored].to(value_pool.dtype)


def paged_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of each request's last tokens over its paged keys and values; [T, heads, dim].

    Rows of no request are zero; what a page holds behind a request's last key does not matter, even NaN.
    query: [T, heads, dim]; pools: [pages, page_size, kv_heads, dim], heads a multiple of kv_heads;
    query_start: int32 [R + 1]; kv_length: int32 [R], valid keys, the queries' own included;
    block_table: int32 [R, pages per request]. Query `i` of `n` sits at position `kv_length - n + i` and sees
    the keys at most there; `window` > 0 keeps only the nearest `window` keys (itself included), and pages wholly
    before it may be gone (any number in the table);
    `softcap` > 0 replaces a score s by `softcap * tanh(s / softcap)`.
    """
    out = torch.zeros_like(query)
    page_size, kv_heads = key_pool.shape[1:3]
    group = query.shape[1] // kv_heads
    for request in range(len(kv_length)):
        first, last, length = int(query_start[request]), int(query_start[request + 1]), int(kv_length[request])
        start = max(length - (last - first) - window + 1, 0) if window > 0 else 0  # pages before may be gone
        slots = torch.arange(start, length, device=query.device)
        pages, position = block_table[request, slots // page_size].long(), slots % page_size
        wide = _wide(query)
        keys = key_pool[pages, position].to(wide).repeat_interleave(group, dim=1)
        values = value_pool[pages, position].to(wide).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[first:last].to(wide), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        own = torch.arange(length - (last - first), length, device=query.device)
        distance = own[:, None] - slots[None, :]
        hidden = (distance < 0) | (distance >= window) if window > 0 else distance < 0
        probability = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", probability, values).to(query.dtype)
    return out


def _segments(segments: Segments) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    starts = segments.start.tolist()
    return [
        (slot, segments.token[first:last].long(), segments.weight[first:last])
        for slot, first, last in zip(segments.slot.tolist(), starts[:-1], starts[1:], strict=True)
    ]


def _wide(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _dtype(record: torch.Tensor, what: str) -> torch.dtype:
    if int(record[Field.DTYPE]) == INT4:
        raise ValueError(f"{what} of 4-bit numbers is not possible")
    return FACTOR_DTYPES[int(record[Field.DTYPE])]


def _block(pool: torch.Tensor, record: torch.Tensor, field: Field, shape: tuple[int, int]) -> torch.Tensor:
    if int(record[Field.DTYPE]) == INT4:
        row_bytes, groups = int4_row(shape[1])
        data = _bytes(pool, record, field, shape[0] * (row_bytes + groups))
        numbers, scales = data[: shape[0] * row_bytes], data[shape[0] * row_bytes :]
        return int4_values(numbers.view(shape[0], row_bytes), scales.view(shape[0], groups), shape[1])
    dtype = FACTOR_DTYPES[int(record[Field.DTYPE])]
    return _bytes(pool, record, field, shape[0] * shape[1] * dtype.itemsize).view(dtype).view(shape)


def _floats(pool: torch.Tensor, record: torch.Tensor, field: Field, count: int) -> torch.Tensor:
    return _bytes(pool, record, field, 4 * count).view(torch.float32)


def _bytes(pool: torch.Tensor, record: torch.Tensor, field: Field, count: int) -> torch.Tensor:
    return _slice(pool, field.name, int(record[field]), count)


def _slice(pool: torch.Tensor, name: str, start: int, count: int) -> torch.Tensor:
    if start < 0 or start + count > len(pool):
        raise ValueError(f"block {name} at {start} of {count} bytes lies outside the pool of {len(pool)}")
    return pool[start : start + count]


def _add(
    total: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor | None,
    pool: torch.Tensor,
    record: torch.Tensor,
) -> None:
    """`total[rows] += weight * (B (C (d * h)) + bias)`; a row may stand in `rows` more than once."""
    rank, out = int(record[Field.RANK]), total.shape[1]
    delta = torch.zeros(len(rows), out, dtype=total.dtype, device=total.device)
    if h is not None:
        scaled = h * _floats(pool, record, Field.D, rank)
        if int(record[Field.CORE]) >= 0:
            scaled = scaled @ _floats(pool, record, Field.CORE, rank * rank).view(rank, rank).to(h.dtype)
        delta += scaled @ _block(pool, record, Field.B, (rank, out)).to(h.dtype)
    if int(record[Field.BIAS]) >= 0:
        delta += _floats(pool, record, Field.BIAS, out)
    total.index_add_(0, rows, weight[:, None] * delta)
