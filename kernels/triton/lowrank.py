"""The adapter ops as launches. Shapes and types have been checked; nothing here waits for the device.

Buffers come from torch's allocator, so within a captured CUDA graph they belong to it, at fixed addresses.
"""

from collections.abc import Sequence
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
    outer = max(y.shape[1] for y in ys)
    if fuse is None:
        small = launch.fused(len(chunks.slot), x.shape[1], outer, chunks.limits.factors)
        fuse = small and not chunks.limits.cores
    x = _rows(x)
    columns = (int(Field.A), int(Field.RANK), int(Field.DTYPE))
    h = x if fuse else shrink(x, pool, records, chunks, columns)
    _expand(ys, h, x, pool, records, chunks, launch.shrink_launch(x.dtype, x.shape[1]).parts, fuse)


def gated_lowrank(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    gates: torch.Tensor,
    chunks: Chunks,
) -> None:
    """`reference.gated_lowrank`."""
    limits, x = chunks.limits, _rows(x)
    h = shrink(x, pool, [records], chunks, (int(Field.A), int(Field.RANK), int(Field.DTYPE)))
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
    _expand([y], h, x, pool, [records], chunks, 1, False)


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
    _expand([y], h, y, pool, [records], chunks, 1, False)


def replace_weight(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, chunks: Chunks) -> None:
    """`reference.replace_weight`; a weight of int8 gives NaN."""
    x, target, row = _rows(x), _rows(y), launch.REPLACE[x.dtype != torch.float32]
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
) -> torch.Tensor:
    """Parts of `A x` of every entry, float32 [parts, group, entries, width]; beyond an entry's rank undefined."""
    row, entries, limits = launch.shrink_launch(x.dtype, x.shape[1]), len(chunks.slot), chunks.limits
    h = torch.empty((row.parts, len(records), entries, limits.width), device=x.device)
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
        BLOCK_R=row.block_r,
        BLOCK_K=row.block,
        **launch.shrink_options(row, limits.factors),
    )
    return h


def _with_cores(
    h: torch.Tensor, pool: torch.Tensor, records: Sequence[torch.Tensor], chunks: Chunks, parts: int
) -> torch.Tensor:
    entries, width = len(chunks.slot), chunks.limits.width
    out = torch.empty((1, len(records), entries, width), device=h.device)
    lora_core[(entries, len(records))](
        out,
        h,
        pool,
        *_three(records),
        records[0].stride(0),
        chunks.slot,
        width,
        GROUP=len(records),
        PARTS=parts,
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
    parts: int,
    fuse: bool,
) -> None:
    if chunks.limits.cores and not fuse:
        h, parts = _with_cores(h, pool, records, chunks, parts), 1
    targets = [_rows(y) for y in ys]
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
        PARTS=parts,
        FACTORS=chunks.limits.factors,
        BLOCK_R=row.block_r,
        BLOCK_K=launch.shrink_launch(x.dtype, x.shape[1]).block,
        BLOCK_N=row.block,
        **launch.expand_options(row, fuse, torch.version.hip is None),
    )
    for y, target in zip(ys, targets, strict=True):
        if target is not y:
            y.copy_(target)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Itself if its rows have unit stride, else a copy."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _three(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    return items[0], items[min(1, len(items) - 1)], items[len(items) - 1]
