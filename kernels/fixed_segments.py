"""A step's segments at fixed addresses, as a captured CUDA graph reads them. Reached through `kernels.dispatch`."""

from dataclasses import replace

import numpy as np
import torch

from kernels.segments import Limits, Segments
from kernels.triton.chunks import ChunkTable


class FixedSegments:
    """Room for `capacity` entries (rows times the adapters of each); `segments` always are those of the last `fill`.

    Segments that a step does not need are empty.
    """

    def __init__(self, capacity: int, device: torch.device | str, limits: Limits, *, with_chunks: bool) -> None:
        self.capacity = capacity
        self._buffer = torch.zeros(4, capacity + 4, dtype=torch.int32, device=device)
        self._chunks = ChunkTable(capacity, capacity, device, limits) if with_chunks else None
        self.segments = replace(self._views(self._buffer), chunks=self._chunks.chunks if self._chunks else None)

    def fill(self, segments: Segments) -> None:
        """Lay out a step given in host memory, in copies that do not wait for the device.

        Raises ValueError if it has more entries than fit.
        """
        entries = len(segments.token)
        if entries > self.capacity:
            raise ValueError(f"{entries} entries; {self.capacity} fit")
        host = torch.zeros(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        slot, start, token, weight = host.numpy()
        begins = segments.start.numpy()
        used = np.flatnonzero(np.diff(begins))  # so that there are never more segments than entries
        slot[: len(used)] = segments.slot.numpy()[used]
        start[: len(used)] = begins[used]
        start[len(used) :] = entries
        token[:entries] = segments.token.numpy()
        weight.view(np.float32)[:entries] = segments.weight.numpy()
        self._buffer.copy_(host, non_blocking=True)
        if self._chunks is not None:
            self._chunks.fill(segments)

    def _views(self, buffer: torch.Tensor) -> Segments:
        slot, start, token, weight = buffer
        capacity = self.capacity
        return Segments(slot[:capacity], start[: capacity + 1], token[:capacity], weight.view(torch.float32)[:capacity])
