"""The paged key-value pool: one flat buffer, a page holding one block of tokens of all layers."""

import math

import torch

from server.model.memory import MemoryAhead, lazy_bytes


class KVCache:
    """Keys and values of all requests, `[pages, layers, 2, page_size, kv_heads, dim]`.

    A page is contiguous over the layers, so that pages can be traded against adapter memory; what a layer's kernel sees
    is a strided view. The content of a page is whatever its last user left (zeros at first). buffer: uint8 memory whose
    first pages become the cache's; without it the cache has memory of its own.
    """

    def __init__(
        self,
        num_pages: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = 16,
        buffer: torch.Tensor | None = None,
    ) -> None:
        shape = (num_pages, layers, 2, page_size, kv_heads, head_dim)
        count = math.prod(shape) * dtype.itemsize
        memory = lazy_bytes(count, torch.device(device)) if buffer is None else buffer[:count]
        self.buffer = memory.view(dtype).view(shape)
        self._ahead = MemoryAhead(memory)
        self._layers = [(self.buffer[:, layer, 0], self.buffer[:, layer, 1]) for layer in range(layers)]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pool of one layer, each `[pages, page_size, kv_heads, dim]` with a page stride."""
        return self._layers[index]

    def take_memory(self, pages: int) -> bool:
        """A piece of the first `pages` pages' memory, or of what comes after them; False: there is nothing to take."""
        return self._ahead.take(pages * self.page_bytes)

    @property
    def num_pages(self) -> int:
        return self.buffer.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.buffer.shape[3]

    @property
    def page_bytes(self) -> int:
        return self.buffer[0].numel() * self.buffer.element_size()


def cache_dtype(model: torch.dtype, quantization: str) -> torch.dtype:
    """Type of the cache where none is asked for: the model's, so that it loses nothing.

    Beside products in int8 the rounding to float16 does not count: by itself it moves a log probability by 0.0006 nats,
    int8 by 0.19 (bfloat16: 0.005; `tests.bench.quality`). Reading half the bytes takes attention of 8 requests of 140
    tokens from 5.4 to 3.2 ms of a step (2-core AVX-512 VM, 2026-11-25).
    """
    return torch.float16 if quantization == "int8" and model == torch.float32 else model


def page_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = 16) -> int:
    """Bytes of one page: both halves of `page_size` tokens of all layers."""
    return layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize
