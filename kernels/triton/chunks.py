"""The chunk table: a step's rows in pieces that one program of a kernel takes, laid out on the host.

Why pieces by *row*, not by segment. A row of a weighted composition stands in several segments. Were each segment
expanded by programs of its own, two of them would add to one row: with atomics the order of the sum, and so its bits,
would change from run to run; with one launch per layer a bfloat16 row would be rounded once per adapter, while the
reference rounds once. So rows that take the same list of adapters form a chunk, and one program adds that list up in
segment order, in float32, and stores the row once. A row's arithmetic then depends on its own list alone: a matrix
product keeps its 16 rows apart, so neither batch-mates nor the row's place in the chunk change a bit.

Why 16 rows: the least that tensor cores take. More would waste them in decode, where an adapter often has one row.
"""

from dataclasses import replace

import numpy as np
import torch

from kernels.segments import Chunks, Limits, Segments

ROWS = 16  # rows of a chunk at most
_COLUMNS = 3  # of the table


class ChunkTable:
    """One buffer at a fixed address, so a captured CUDA graph sees each step that `fill` puts there.

    The grid of a kernel is `max_chunks`; programs of unused chunks return at once.
    """

    def __init__(
        self, max_entries: int, max_chunks: int, device: torch.device | str, limits: Limits | None = None
    ) -> None:
        self._buffer = torch.zeros(max_chunks * _COLUMNS + 3 * max_entries, dtype=torch.int32, device=device)
        self._max_chunks, self._max_entries = max_chunks, max_entries
        self.chunks = replace(_views(self._buffer, max_chunks), limits=limits or Limits())
        self.chunks.slot.fill_(-1)

    def fill(self, segments: Segments) -> Chunks:
        """Lay out a step given in host memory, in one copy that does not wait for the device.

        Raises ValueError, and leaves the table as it was, if the step has more chunks or entries than fit.
        """
        table, order = layout(segments)
        if len(table) > self._max_chunks or len(order) > self._max_entries:
            raise ValueError(
                f"{len(table)} chunks of {len(order)} entries; {self._max_chunks} and {self._max_entries} fit"
            )
        pinned = self._buffer.is_cuda  # torch keeps a pinned buffer until its copies are done
        host = torch.zeros(self._buffer.shape, dtype=torch.int32, pin_memory=pinned)
        _write(host.numpy(), self._max_chunks, segments, table, order)
        self._buffer.copy_(host, non_blocking=True)
        return self.chunks


def chunks_of(segments: Segments, device: torch.device | str, limits: Limits | None = None) -> Chunks:
    """The chunks of one step given in host memory, in tensors that just fit; never empty."""
    table, order = layout(segments)
    return ChunkTable(max(len(order), 1), max(len(table), 1), device, limits).fill(segments)


def layout(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Table [chunks, 3] and, for each place among the chunks' entries, its entry in `segments`; int64 both."""
    token = segments.token.numpy()
    segment = np.repeat(np.arange(len(segments)), np.diff(segments.start.numpy()))
    alone = np.bincount(token)[token] == 1 if len(token) else np.empty(0, dtype=bool)
    entries = np.flatnonzero(alone)
    tables, orders, first = [_runs(segment[entries])], [entries], len(entries)
    if first < len(token):
        for members, layers in _compositions(np.flatnonzero(~alone), token, segments.slot.numpy()[segment]):
            for start in range(0, len(members), ROWS):
                piece = members[start : start + ROWS]
                tables.append(np.array([[first, len(piece), layers]]))
                orders.append(piece.T.reshape(-1))
                first += piece.size
    return np.concatenate(tables), np.concatenate(orders)


def _runs(segment: np.ndarray) -> np.ndarray:
    """Chunks of rows that have one entry each: those of one segment together. segment: of each entry, ascending."""
    in_segment = np.arange(len(segment)) - np.searchsorted(segment, segment)
    first = np.flatnonzero(in_segment % ROWS == 0)
    table = np.ones((len(first), _COLUMNS), dtype=np.int64)
    table[:, 0] = first
    table[:-1, 1], table[-1:, 1] = first[1:], len(segment)
    table[:, 1] -= first
    return table


def _compositions(entries: np.ndarray, token: np.ndarray, slot: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Rows with several entries, those of one list of adapters together: [rows, layers], and the layers."""
    lists: dict[int, list[int]] = {}
    for entry in entries.tolist():  # in segment order
        lists.setdefault(int(token[entry]), []).append(entry)
    alike: dict[tuple[int, ...], list[list[int]]] = {}
    for own in lists.values():
        alike.setdefault(tuple(slot[own].tolist()), []).append(own)
    return [(np.asarray(rows), len(slots)) for slots, rows in alike.items()]


def _views(buffer: torch.Tensor, chunks: int) -> Chunks:
    entries = (len(buffer) - chunks * _COLUMNS) // 3
    table, slot, token, weight = torch.split(buffer, [chunks * _COLUMNS, entries, entries, entries])
    return Chunks(table.view(chunks, _COLUMNS), slot, token, weight.view(torch.float32))


def _write(buffer: np.ndarray, chunks: int, segments: Segments, table: np.ndarray, order: np.ndarray) -> None:
    """buffer: zeros in host memory, laid out as `_views` reads it."""
    slot, token, weight = buffer[chunks * _COLUMNS :].reshape(3, -1)
    buffer[: table.size] = table.reshape(-1)
    slot[: len(order)] = np.repeat(segments.slot.numpy(), np.diff(segments.start.numpy()))[order]
    slot[len(order) :] = -1
    token[: len(order)] = segments.token.numpy()[order]
    weight.view(np.float32)[: len(order)] = segments.weight.numpy()[order]
