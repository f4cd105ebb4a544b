"""Shapes, types and indices of what goes to the reference, as the C++ kernels check their own."""

import torch

from kernels.segments import (
    FACTOR_DTYPES,
    FACTOR_TYPES,
    FORM_FIELDS,
    GATE_FIELDS,
    RECORD_FIELDS,
    Field,
    GateField,
    Segments,
)

INT8 = FACTOR_DTYPES.index(torch.int8)


def product(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments | None
) -> None:
    """Arguments of `lowrank` and `replace_weight`; without segments only what is known without waiting for a GPU."""
    _rows(y, x)
    _step(y, pool, records, segments)


def embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments | None
) -> None:
    """Arguments of `lowrank_embedding`; segments as for `product`."""
    _ids(y, ids)
    _step(y, pool, records, segments)


def form_product(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> None:
    """Arguments of `sparse_delta` and `dense_delta`."""
    _rows(y, x)
    form_rows(y, pool, forms, segments)


def form_embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> None:
    """Arguments of `sparse_embedding`."""
    _ids(y, ids)
    form_rows(y, pool, forms, segments)


def form_rows(rows: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> None:
    """Arguments of `transform_input` and `scale_output`."""
    _floating("rows", rows)
    if rows.dim() != 2:
        raise ValueError(f"rows [T, features] expected, got {list(rows.shape)}")
    _pool(pool)
    if forms.dtype != torch.int64 or forms.dim() != 2 or forms.shape[1] != FORM_FIELDS:
        raise ValueError(f"forms: int64 [slots, {FORM_FIELDS}] expected, got {forms.dtype} {list(forms.shape)}")
    _inside_step(rows, forms, segments)


def float_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Arguments of `linear`."""
    _floating("x", x)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x [T, in] and weight [out, in] of one type expected, got {x.dtype} {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias [{len(weight)}] expected, got {list(bias.shape)}")


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Arguments of `int8_linear`."""
    _floating("x", x)
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight: int8 [out, in] expected, got {weight.dtype} {list(weight.shape)}")
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit the weight {list(weight.shape)}")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and (vector.shape != (len(weight),) or vector.dtype != torch.float32):
            raise ValueError(f"{name}: float32 [{len(weight)}] expected, got {vector.dtype} {list(vector.shape)}")


def pages(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """Arguments of `write_kv`."""
    page_shapes(key, value, key_pool, value_pool, slots)
    _inside("slot", slots, key_pool.shape[0] * key_pool.shape[1])


def page_shapes(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """What is known of the arguments of `write_kv` without waiting for a GPU."""
    _alike(key_pool, value_pool)
    for name, tokens, pool in (("key", key, key_pool), ("value", value, value_pool)):
        if tokens.dim() != 3 or pool.dim() != 4 or tokens.shape[1:] != pool.shape[2:]:
            raise ValueError(
                f"{name} [T, kv_heads, dim] and pool [pages, page_size, kv_heads, dim] expected, "
                f"got {list(tokens.shape)} and {list(pool.shape)}"
            )
        if slots.dim() != 1 or slots.dtype != torch.int64 or len(slots) != len(tokens):
            raise ValueError(f"int64 slots [{len(tokens)}] expected, got {slots.dtype} {list(slots.shape)}")


def attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    window: int,
) -> None:
    """Arguments of `paged_attention`."""
    attention_shapes(query, key_pool, value_pool, query_start, kv_length, block_table)
    queries = query_start.diff()
    if bool((queries < 0).any()) or bool((queries > kv_length).any()) or int(query_start[-1]) > len(query):
        raise ValueError(f"queries {query_start.tolist()} do not fit {len(query)} rows and {kv_length.tolist()} keys")
    page_size = key_pool.shape[1]
    _inside("kv_length", kv_length, block_table.shape[1] * page_size + 1)
    for request, (length, count) in enumerate(zip(kv_length.tolist(), queries.tolist(), strict=True)):
        first = max(length - count - window + 1, 0) // page_size if window > 0 else 0
        _inside(f"page of request {request}", block_table[request, first : -(-length // page_size)], len(key_pool))


def attention_shapes(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """What is known of the arguments of `paged_attention` without waiting for a GPU."""
    _alike(key_pool, value_pool)
    kv_heads, dim = key_pool.shape[2:]
    if query.dim() != 3 or query.shape[2] != dim or query.shape[1] % kv_heads:
        raise ValueError(f"query {list(query.shape)} does not fit {kv_heads} KV heads of {dim}")
    requests = kv_length.numel()
    if query_start.shape != (requests + 1,) or block_table.dim() != 2 or len(block_table) != requests:
        raise ValueError(
            f"query_start [R + 1], kv_length [R], block_table [R, pages] expected, got {list(query_start.shape)}, "
            f"{list(kv_length.shape)}, {list(block_table.shape)}"
        )
    for name, tensor in (("query_start", query_start), ("kv_length", kv_length), ("block_table", block_table)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; int32 expected")


def gates(gates: torch.Tensor, records: torch.Tensor, segments: Segments | None) -> None:
    """The table of gates beside the records of `gated_lowrank`; segments as for `product`."""
    if gates.dtype != torch.int64 or gates.shape != (len(records), GATE_FIELDS):
        raise ValueError(
            f"gates: int64 [{len(records)}, {GATE_FIELDS}] expected, got {gates.dtype} {list(gates.shape)}"
        )
    if segments is None:
        return
    for slot in segments.slot.tolist():
        rank, gate = int(records[slot, Field.RANK]), gates[slot].tolist()
        rows, active = gate[GateField.ROWS], gate[GateField.ACTIVE]
        if not rank or not rows:
            continue
        if gate[GateField.RANK] != rank or rows < 0 or rank % rows or not 0 < active <= rank:
            own = f"rank {gate[GateField.RANK]}, {rows} router rows, {active} active ranks"
            raise ValueError(f"a gate of {own} does not fit rank {rank}")
        if not 0 <= gate[GateField.DTYPE] < len(FACTOR_DTYPES) or gate[GateField.DTYPE] == INT8:
            raise ValueError(f"router type {gate[GateField.DTYPE]} is no floating type")
        if gate[GateField.COUNTS] >= 0 and gate[GateField.COUNTS] % 8:
            raise ValueError(f"block COUNTS at {gate[GateField.COUNTS]} is not aligned")


def _alike(key_pool: torch.Tensor, value_pool: torch.Tensor) -> None:
    if key_pool.dim() != 4 or key_pool.shape != value_pool.shape or key_pool.dtype != value_pool.dtype:
        raise ValueError(f"key and value pool differ: {list(key_pool.shape)} and {list(value_pool.shape)}")


def _step(y: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments | None) -> None:
    _floating("y", y)
    _pool(pool)
    if records.dtype != torch.int64 or records.dim() != 2 or records.shape[1] != RECORD_FIELDS:
        raise ValueError(f"records: int64 [slots, {RECORD_FIELDS}] expected, got {records.dtype} {list(records.shape)}")
    if segments is None:
        return
    _inside_step(y, records, segments)
    rank = records[segments.slot.long(), Field.RANK]
    if rank.numel() and int(rank.min()) < 0:
        raise ValueError(f"rank {int(rank.min())} is negative")
    _inside("factor type", records[segments.slot.long(), Field.DTYPE], FACTOR_TYPES)


def _rows(y: torch.Tensor, x: torch.Tensor) -> None:
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0]:
        raise ValueError(f"y [T, out] and x [T, in] expected, got {list(y.shape)} and {list(x.shape)}")
    _floating("x", x)


def _ids(y: torch.Tensor, ids: torch.Tensor) -> None:
    if y.dim() != 2 or ids.dim() != 1 or y.shape[0] != ids.shape[0] or ids.dtype != torch.int64:
        raise ValueError(
            f"y [T, dim] and int64 ids [T] expected, got {list(y.shape)} and {ids.dtype} {list(ids.shape)}"
        )


def _pool(pool: torch.Tensor) -> None:
    if pool.dtype != torch.uint8 or pool.dim() != 1:
        raise ValueError(f"pool: uint8 [bytes] expected, got {pool.dtype} {list(pool.shape)}")


def _inside_step(rows: torch.Tensor, table: torch.Tensor, segments: Segments) -> None:
    """Whether segments fit the step's rows, and the table's slots."""
    if segments.start.shape != (len(segments) + 1,) or segments.token.shape != segments.weight.shape:
        raise ValueError(
            f"segments: {len(segments)} slots, {len(segments.start)} starts, {len(segments.token)} tokens, "
            f"{len(segments.weight)} weights do not fit"
        )
    _inside("slot", segments.slot, len(table))
    _inside("token", segments.token, len(rows))
    _inside("segment start", segments.start, len(segments.token) + 1)


def _floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; a floating type expected")


def _inside(name: str, values: torch.Tensor, end: int) -> None:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(f"{name} {int(values.min())} to {int(values.max())} lies outside 0 to {end - 1}")
