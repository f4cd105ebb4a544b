"""Sizes of an engine, and how its device memory is dealt between KV cache and adapters."""

from dataclasses import dataclass

import torch

from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.kv_cache import page_bytes

BLOCK_SIZE = 16  # tokens
STUCK_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of the engine. Memory in bytes, the rest in tokens or requests; max_context None: the model's own.

    device_memory: of KV cache and adapters together; kv_cache_memory and adapter_memory are what each of them is sure
    of, and None means no more than those. host_adapter_memory: for adapters out of the device's. kv_cache_dtype None:
    what `server.model.kv_cache.cache_dtype` says. max_rank: of any adapter that `load` gives; GPU kernels make room for
    it. stuck_seconds: see `Liveness`.
    """

    kv_cache_memory: int = 1 << 30
    adapter_memory: int = 1 << 30
    device_memory: int | None = None
    host_adapter_memory: int = 1 << 30
    max_batch_tokens: int = 512
    max_running: int = 64
    max_queued: int = 256
    max_context: int | None = None
    max_rank: int = 256
    kv_cache_dtype: torch.dtype | None = None
    stuck_seconds: float = STUCK_SECONDS


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """How the pages of the one buffer of KV cache and adapters are dealt.

    The first `kv_floor` are the KV cache's for ever, those from `kv_pages` on the adapters'; the ones between belong to
    whoever needs them. Zones and not counts: an adapter's block that takes many pages in a row finds them in its own.
    """

    num_pages: int
    kv_floor: int
    kv_pages: int
    page_bytes: int

    @classmethod
    def of(cls, base: BaseModel, dtype: torch.dtype, limits: EngineLimits) -> "DeviceMemory":
        """Raises ModelLoadError if the KV cache is not sure of a single block."""
        page = page_bytes(base.num_layers, base.num_kv_heads, base.head_dim, dtype, BLOCK_SIZE)
        floor, adapters = limits.kv_cache_memory // page, limits.adapter_memory // page
        if not floor:
            raise ModelLoadError(
                f"--kv-cache-memory of {limits.kv_cache_memory} bytes holds no block; one block is {page} bytes."
            )
        total = max(floor + adapters, (limits.device_memory or 0) // page)
        return cls(total, floor, total - adapters, page)
