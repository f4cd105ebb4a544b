"""Large buffers of the CPU: taken page by page on first use, and in huge pages where the system has them."""

import mmap

import torch


def lazy_bytes(count: int, device: torch.device) -> torch.Tensor:
    """`count` zero bytes, uint8 [count]. Raises RuntimeError or OSError if the system refuses.

    On a CPU the memory is only reserved: `torch.zeros` would write all of it at the start. Huge pages take 19 to 25 %
    off the adapter products, which walk through many small blocks (one thread, 2-core AVX-512 VM, 2026-11-23).
    """
    if device.type != "cpu":
        return torch.zeros(count, dtype=torch.uint8, device=device)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(count, dtype=torch.uint8)
    # The default flags make shared memory, which gets no huge pages.
    region = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)[:count]
