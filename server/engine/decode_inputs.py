"""The inputs of a decode step in buffers whose addresses stay, padded to a fixed number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import dispatch
from kernels.segments import Limits, Segments
from server.model.step_context import AttentionMetadata

NOWHERE = -1  # slot of a row whose keys and values are not stored


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token of each of several requests. segments: of these rows, in host memory; None: all of them are base."""

    tokens: Sequence[int]
    positions: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    segments: Segments | None

    @property
    def entries(self) -> int:
        """Pairs of a row and one of its adapters."""
        return 0 if self.segments is None else len(self.segments.token)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What the buffers of every size have in common; width: blocks that a request can have; rank: the highest."""

    width: int
    block_size: int
    rank: int


class DecodeInputs:
    """Room for `size` rows and as many entries.

    A row of padding has no request: the requests behind the last have no query and no key, so its attention is zero;
    it stores nothing (`NOWHERE`) and has no adapter. kinds: what its adapters may be.
    """

    def __init__(self, size: int, shape: DecodeShape, kinds: Limits, device: torch.device) -> None:
        self.size = size
        self._block_size = shape.block_size
        self._rows = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._requests = torch.zeros(2, -(-(size + 1) // 4) * 4, dtype=torch.int32, device=device)  # aligned
        self._table = torch.zeros(size, shape.width, dtype=torch.int32, device=device)
        self._segments = dispatch.fixed(size, device, kinds)
        self.tokens, self.positions, slots = self._rows
        self.attention = AttentionMetadata(self._requests[0, : size + 1], self._requests[1, :size], self._table, slots)
        self.segments = self._segments.segments
        self.logit_rows = torch.arange(size, device=device)

    def fill(self, step: DecodeStep) -> None:
        """Lay out a step that fits, in copies that do not wait for the device."""
        count, pinned = len(step.tokens), self._rows.is_cuda
        rows = torch.zeros(self._rows.shape, dtype=torch.int64, pin_memory=pinned)
        rows[0, :count], rows[1, :count] = torch.tensor(step.tokens), torch.tensor(step.positions)
        pages = [
            table[position // self._block_size]
            for table, position in zip(step.block_tables, step.positions, strict=True)
        ]
        rows[2, count:] = NOWHERE
        rows[2, :count] = torch.tensor(pages) * self._block_size + rows[1, :count] % self._block_size
        requests = torch.zeros(self._requests.shape, dtype=torch.int32, pin_memory=pinned)
        requests[0] = torch.arange(requests.shape[1]).clamp(max=count)
        requests[1, :count] = rows[1, :count] + 1
        # What stands behind a request's last page is never read, so an earlier step's may stay there.
        width = max(len(table) for table in step.block_tables)
        table = torch.zeros(count, width, dtype=torch.int32, pin_memory=pinned)
        for row, blocks in zip(table, step.block_tables, strict=True):
            row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self._rows.copy_(rows, non_blocking=True)
        self._requests.copy_(requests, non_blocking=True)
        self._table[:count, :width].copy_(table, non_blocking=True)
        if step.segments is not None:
            self._segments.fill(step.segments)
