"""Paged attention as launches. Shapes and types have been checked; nothing here waits for the device."""

import torch
import triton

from kernels.triton import launch
from kernels.triton.paged_attention import paged_attention, paged_merge
from kernels.triton.write_kv import write_kv as write_kv_kernel

EVERY_KEY = 2**30  # a window that hides none


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """`reference.write_kv`."""
    if not len(key):
        return
    key, value = launch.unit_stride(key), launch.unit_stride(value)
    count = key.shape[1] * key.shape[2]
    write_kv_kernel[(len(key), triton.cdiv(count, launch.WRITE_BLOCK))](
        key,
        value,
        *key.stride()[:2],
        *value.stride()[:2],
        key_pool,
        value_pool,
        *key_pool.stride()[:3],
        slots,
        count,
        PAGE=key_pool.shape[1],
        DIM=key.shape[2],
        BLOCK=launch.WRITE_BLOCK,
        **launch.OPTIONS,
    )


def attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    split: bool | None = None,
) -> torch.Tensor:
    """`reference.paged_attention`; `split`: a program for each partition of the keys, None: as the launch table says.

    The grid follows from shapes alone (rows, requests, width of the block table), so a captured graph takes every step
    of the same shapes.
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    if not len(query) or not len(kv_length):
        return out
    query, (page, kv_heads, dim) = launch.unit_stride(query), key_pool.shape[1:]
    tokens, heads = query.shape[:2]
    row = launch.attention_launch(heads // kv_heads, dim, query.dtype, key_pool.dtype)
    tiles = tokens // (row.block_m // (heads // kv_heads)) + len(kv_length)
    partitions = triton.cdiv(block_table.shape[1] * page, launch.PARTITION)
    if split is None:
        split = launch.split(tiles * kv_heads, partitions)
    state, sums = (
        torch.empty((partitions, tokens, heads, size), device=query.device) if split else out.new_empty(0).float()
        for size in (dim, 2)
    )
    requests, window = (len(kv_length), len(kv_length).bit_length()), window if window > 0 else EVERY_KEY
    sizes = {"PARTITION": launch.PARTITION, "GROUP": heads // kv_heads, "DIM": dim, "BLOCK_M": row.block_m}
    sizes["BLOCK_D"] = row.block_d
    options = row.options(torch.version.hip is None)
    paged_attention[(tiles, kv_heads, partitions if split else 1)](
        out, state, sums, query, *query.stride()[:2], key_pool, value_pool, *key_pool.stride()[:3], query_start,
        kv_length, block_table, block_table.stride(0), *requests, tokens, window, scale, softcap,
        CAPPED=softcap > 0, SPLIT=split, PAGE=page, BLOCK_N=row.block_n, **sizes, **options,
    )  # fmt: skip
    if split:
        paged_merge[(tiles, kv_heads)](
            out, state, sums, query_start, kv_length, *requests, tokens, window, **sizes, **options
        )
    return out
