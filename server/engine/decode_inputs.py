"""The inputs of a decode step in buffers whose addresses stay, padded to a fixed number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
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
        self._buffer = torch.zeros(_aligned(size + 1) + 3 * size, dtype=torch.int64, device=device)
        self._table = torch.zeros(size, shape.width, dtype=torch.int32, device=device)
        self._pages = np.zeros((size, shape.width), dtype=np.int32)  # what the table holds, as are the lists below
        self._block_tables: list[Sequence[int]] = [[]] * size
        self._segments = dispatch.fixed(size, device, kinds)
        requests, (self.tokens, self.positions, slots) = self._views(self._buffer)
        self.attention = AttentionMetadata(requests[0, : size + 1], requests[1, :size], self._table, slots)
        self.segments = self._segments.segments
        self.logit_rows = torch.arange(size, device=device)

    def fill(self, step: DecodeStep) -> None:
        """Lay out a step that fits, in copies that do not wait for the device."""
        count = len(step.tokens)
        host = torch.zeros(self._buffer.shape, dtype=torch.int64, pin_memory=self._buffer.is_cuda)
        requests, (tokens, positions, slots) = (view.numpy() for view in self._views(host))
        tokens[:count], positions[:count] = step.tokens, step.positions
        slots[:count] = [
            table[position // self._block_size] * self._block_size + position % self._block_size
            for table, position in zip(step.block_tables, step.positions, strict=True)
        ]
        slots[count:] = NOWHERE
        requests[0] = np.minimum(np.arange(requests.shape[1]), count)
        requests[1, :count] = positions[:count] + 1
        self._buffer.copy_(host, non_blocking=True)
        self._fill_table(step.block_tables)
        if step.segments is not None:
            self._segments.fill(step.segments)

    def _fill_table(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Lay out what is not there from an earlier step: a request's pages change once in `block_size` steps.

        What stands behind a request's last page is never read, so an earlier step's may stay there.
        """
        changed = [row for row, blocks in enumerate(block_tables) if blocks != self._block_tables[row]]
        if not changed:
            return
        count, width = len(block_tables), max(len(blocks) for blocks in block_tables)
        lengths = np.array([len(block_tables[row]) for row in changed])
        pages = np.zeros((len(changed), width), dtype=np.int32)
        flat = chain.from_iterable(block_tables[row] for row in changed)
        pages[np.arange(width) < lengths[:, None]] = np.fromiter(flat, dtype=np.int32, count=lengths.sum())
        self._pages[changed, :width] = pages
        host = torch.empty(count, width, dtype=torch.int32, pin_memory=self._table.is_cuda)
        host.numpy()[:] = self._pages[:count, :width]
        self._table[:count, :width].copy_(host, non_blocking=True)
        for row in changed:
            self._block_tables[row] = list(block_tables[row])  # the scheduler's own grows

    def _views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each request query start and length, int32; of each row token, position and slot."""
        requests, rows = torch.split(buffer, [_aligned(self.size + 1), 3 * self.size])
        return requests.view(torch.int32).view(2, -1), rows.view(3, -1)


def _aligned(count: int) -> int:
    return -(-count // 4) * 4
