"""The adapter ops as launches. Shapes and types have been checked; nothing here waits for the device.

Buffers come from torch's allocator, so within a captured CUDA graph they belong to it, at fixed addresses.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton

from kernels.segments import Chunks, Field, GateField
from kernels.triton import launch
from kernels.triton.lora_core import lora_core
from kernels.triton.lora_expand import lora_expand
from kernels.triton.lora_gate import lora_gate
from kernels.triton.lora_gather import lora_gather
from kernels.triton.lora_shrink import lora_shrink
from kernels.triton.replace_weight import replace_weight as replace_weight_kernel

GROUP = 3  # modules of one launch at most
FLOATS = 7  # factors of a floating type, a bit per entry of FACTOR_DTYPES
LOW_RANK = (int(Field.A), int(Field.RANK), int(Field.DTYPE))  # columns that a shrink reads


def lowrank_group(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    pool: torch.Tensor,
    records: Sequence[torch.Tensor],
    chunks: Chunks,
    fuse: bool | None = None,
) -> None:
    """`reference.lowrank` for up to 3 modules that read the same x (q, k, v; gate, up), in one or two launches.

    ys: [T, out] each, of one type; records: int64 [slots, RECORD_FIELDS] each, of one stride; `fuse` None: as the
    launch table says; the fused kernel knows no cores.
    """
    if fuse is None:
        fuse = _fused(x, max(y.shape[1] for y in ys), chunks)
    x = launch.unit_stride(x)
    if fuse:
        _expand(ys, x, x, pool, records, chunks, fuse=True)
    else:
        h = _summed(shrink(x, pool, records, chunks, LOW_RANK), pool, records, chunks)
        _expand(ys, h, x, pool, records, chunks)


def beside(x: torch.Tensor, outer: int, chunks: Chunks) -> bool:
    """Whether a step's shrink goes beside the base product: not where it is a part of the expand.

    outer: outputs of the widest module.
    """
    return len(chunks.slot) <= launch.BESIDE_ENTRIES and not _fused(x, outer, chunks)


def lowrank_around(
    product: Callable[[], Sequence[torch.Tensor]],
    x: torch.Tensor,
    pool: torch.Tensor,
    records: Sequence[torch.Tensor],
    chunks: Chunks,
) -> Sequence[torch.Tensor]:
    """`lowrank_group` on the outputs of `product`, with `A x` on a side stream meanwhile, where `beside` says so."""
    main, side, x = torch.cuda.current_stream(x.device), _side_stream(x.device), launch.unit_stride(x)
    count = launch.shrink_launch(x.dtype, x.shape[1]).parts
    # Of the main stream's memory, which nobody else gets before that stream has waited.
    parts, room = (_room(number, x, records, chunks) for number in (count, 1))
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            shrink(x, pool, records, chunks, LOW_RANK, parts)
            h = _summed(parts, pool, records, chunks, room)
        ys = product()
    finally:  # also where something failed: what the side stream writes is freed after this
        main.wait_stream(side)
    _expand(ys, h, x, pool, records, chunks)
    return ys


def gated_lowrank(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    gates: torch.Tensor,
    chunks: Chunks,
) -> None:
    """`reference.gated_lowrank`."""
    limits, x = chunks.limits, launch.unit_stride(x)
    h = shrink(x, pool, [records], chunks, LOW_RANK)
    columns = (int(GateField.ROUTER), int(GateField.ROWS), int(GateField.DTYPE))
    scores = shrink(x, pool, [gates], chunks, columns)
    lora_gate[(h.shape[2],)](
        h,
        scores,
        pool,
        gates,
        gates.stride(0),
        chunks.slot,
        limits.width,
        PARTS=h.shape[0],
        WIDTH=triton.next_power_of_2(limits.width),
        **launch.OPTIONS,
    )
    _expand([y], _summed(h[:1], pool, [records], chunks), x, pool, [records], chunks)


def lowrank_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    chunks: Chunks,
) -> None:
    """`reference.lowrank_embedding`."""
    limits = chunks.limits
    h = torch.empty((1, 1, len(chunks.slot), limits.width), device=y.device)
    lora_gather[(len(chunks.slot),)](
        h,
        ids.contiguous(),
        pool,
        records,
        records.stride(0),
        chunks.slot,
        chunks.token,
        limits.width,
        WIDTH=triton.next_power_of_2(limits.width),
        **launch.OPTIONS,
    )
    _expand([y], _summed(h, pool, [records], chunks), y, pool, [records], chunks)


def replace_weight(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, chunks: Chunks) -> None:
    """`reference.replace_weight`; a weight of int8 gives NaN."""
    x, target, row = launch.unit_stride(x), launch.unit_stride(y), launch.REPLACE[x.dtype != torch.float32]
    replace_weight_kernel[(len(chunks.table), triton.cdiv(y.shape[1], row.block_r))](
        target,
        target.stride(0),
        y.shape[1],
        x,
        x.stride(0),
        x.shape[1],
        pool,
        records,
        records.stride(0),
        chunks.table,
        chunks.slot,
        chunks.token,
        chunks.weight,
        FACTORS=chunks.limits.factors & FLOATS,
        BLOCK_R=row.block_r,
        BLOCK_K=row.block,
        **row.options,
    )
    if target is not y:
        y.copy_(target)


def shrink(
    x: torch.Tensor,
    pool: torch.Tensor,
    records: Sequence[torch.Tensor],
    chunks: Chunks,
    columns: tuple[int, int, int],
    h: torch.Tensor | None = None,
) -> torch.Tensor:
    """Parts of `A x` of every entry, float32 [parts, group, entries, width]; beyond an entry's rank undefined.

    h: where to, if there is a place.
    """
    row, entries, limits = launch.shrink_launch(x.dtype, x.shape[1]), len(chunks.slot), chunks.limits
    h = _room(row.parts, x, records, chunks) if h is None else h
    lora_shrink[(len(chunks.table), row.parts, len(records))](
        h,
        x,
        x.stride(0),
        x.shape[1],
        pool,
        *_three(records),
        records[0].stride(0),
        chunks.table,
        chunks.slot,
        chunks.token,
        entries,
        limits.width,
        *columns,
        GROUP=len(records),
        PARTS=row.parts,
        FACTORS=limits.factors,
        BLOCK_R=launch.shrink_ranks(row, limits.factors),
        BLOCK_K=row.block,
        **launch.shrink_options(row, limits.factors),
    )
    return h


def _room(parts: int, x: torch.Tensor, records: Sequence[torch.Tensor], chunks: Chunks) -> torch.Tensor:
    return torch.empty((parts, len(records), len(chunks.slot), chunks.limits.width), device=x.device)


def _fused(x: torch.Tensor, outer: int, chunks: Chunks) -> bool:
    """Whether the launch table has one kernel do shrink and expand; that one knows no cores."""
    limits = chunks.limits
    return not limits.cores and launch.fused(len(chunks.slot), x.shape[1], outer, limits.factors)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _summed(
    h: torch.Tensor,
    pool: torch.Tensor,
    records: Sequence[torch.Tensor],
    chunks: Chunks,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The parts of h as one, with the cores done, in `out` if there is such a place; itself if it is one already.

    A launch of its own: every program of the expand would add the same parts up again (on an H100, 8 parts of 8 rows
    for 28,672 outputs: 23 us instead of 14 with 4 parts).
    """
    if len(h) == 1 and not chunks.limits.cores:
        return h
    entries, width = len(chunks.slot), chunks.limits.width
    out = torch.empty_like(h[:1]) if out is None else out
    lora_core[(entries, len(records))](
        out,
        h,
        pool,
        *_three(records),
        records[0].stride(0),
        chunks.slot,
        width,
        GROUP=len(records),
        PARTS=len(h),
        WIDTH=triton.next_power_of_2(width),
        **launch.OPTIONS,
    )
    return out


def _expand(
    ys: Sequence[torch.Tensor],
    h: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: Sequence[torch.Tensor],
    chunks: Chunks,
    fuse: bool = False,
) -> None:
    """h: of `_summed`."""
    targets = [launch.unit_stride(y) for y in ys]
    outer = max(y.shape[1] for y in ys)
    row = launch.expand_launch(ys[0].dtype, outer, chunks.limits.factors)
    lora_expand[(len(chunks.table), triton.cdiv(outer, row.block), len(ys))](
        *_three(targets),
        *_three([y.stride(0) for y in targets]),
        *_three([y.shape[1] for y in targets]),
        h,
        x,
        x.stride(0),
        x.shape[1],
        pool,
        *_three(records),
        records[0].stride(0),
        chunks.table,
        chunks.slot,
        chunks.token,
        chunks.weight,
        len(chunks.slot),
        chunks.limits.width,
        FUSED=fuse,
        CORES=chunks.limits.cores and not fuse,
        GROUP=len(ys),
        PARTS=launch.shrink_launch(x.dtype, x.shape[1]).parts if fuse else 1,
        FACTORS=chunks.limits.factors,
        BLOCK_R=row.block_r,
        BLOCK_K=launch.shrink_launch(x.dtype, x.shape[1]).block,
        BLOCK_N=row.block,
        **launch.expand_options(row, fuse, chunks.limits.factors, torch.version.hip is None),
    )
    for y, target in zip(ys, targets, strict=True):
        if target is not y:
            y.copy_(target)


def _three(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    return items[0], items[min(1, len(items) - 1)], items[len(items) - 1]
