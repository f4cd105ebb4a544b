"""`paged_attention` by torch's own `varlen_attn`, on a GPU and where that function takes what it is given."""

import torch
from torch.nn import attention as torch_attention

FLASH_2_PAGE = 256  # FlashAttention 2, torch's default, takes pages of a multiple of this; 3 and 4 take any
MAX_DIM = 256  # of a head, and a multiple of 8


def takes(query: torch.Tensor, key_pool: torch.Tensor, softcap: float) -> bool:
    """Half types only, no softcap; small pages only where FlashAttention 3 or 4 has been activated."""
    if softcap > 0 or query.dtype not in (torch.float16, torch.bfloat16) or key_pool.dtype != query.dtype:
        return False
    if query.shape[2] % 8 or query.shape[2] > MAX_DIM:
        return False
    return key_pool.shape[1] % FLASH_2_PAGE == 0 or torch_attention.current_flash_attention_impl() in ("FA3", "FA4")


def attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """`reference.paged_attention` without softcap.

    The longest query and the most keys are bounded by shapes, for their true values lie on the device. `num_splits` 1:
    else a request's bits would depend on the longest one in its batch.
    """
    from torch.nn.attention.varlen import varlen_attn_out

    out = torch.zeros_like(query)  # rows of no request stay zero
    varlen_attn_out(
        out,
        query,
        key_pool,
        value_pool,
        query_start,
        None,
        len(query),
        block_table.shape[1] * key_pool.shape[1],
        scale=scale,
        window_size=(window - 1 if window > 0 else -1, 0),
        enable_gqa=query.shape[1] != key_pool.shape[2],
        seqused_k=kv_length,
        block_table=block_table,
        num_splits=1,
    )
    return out
