"""Adapter weights on the device: one flat buffer of bytes, and for each module a table of where its factors lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from adapters_store.forms import AdapterWeights, LowRank, ReplacedWeight
from kernels.segments import FACTOR_DTYPES, RECORD_FIELDS, Field
from server.engine.adapter_pool import Placement
from server.engine.copiers import Arrival, Copier, DirectCopier
from server.model.step_context import AdapterTable

Blocks = tuple[torch.Tensor, ...]  # each uint8 [bytes]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as blocks of bytes in the kernels' layout, with records that refer to blocks by index.

    own: its blocks; shared: further ones, in parts that other adapters may have too, by a digest of their bytes;
    records: module name -> record in the order of `Field`, its offsets being indices of `blocks`.
    """

    digest: str
    own: Blocks
    records: dict[str, list[int]]
    shared: Mapping[bytes, Blocks] = field(default_factory=dict)

    @property
    def blocks(self) -> Blocks:
        """Own and shared, in the order of a placement's offsets."""
        return self.own + tuple(block for part in self.shared.values() for block in part)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each own block."""
        return [block.numel() for block in self.own]

    @property
    def shared_sizes(self) -> dict[bytes, list[int]]:
        """Bytes of each block of each shared part."""
        return {key: [block.numel() for block in part] for key, part in self.shared.items()}

    @property
    def num_bytes(self) -> int:
        return sum(block.numel() for block in self.blocks)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes of an element -> a type that numpy knows
_OFFSET_FIELDS = (Field.A, Field.B, Field.D, Field.BIAS, Field.WEIGHT, Field.WEIGHT_BIAS)


def pack(weights: AdapterWeights, embeddings: frozenset[str], *, pinned: bool = False) -> PackedAdapter:
    """Lay out factors as the kernels read them: B transposed, and on `embeddings` (module names) A transposed too.

    pinned: in one piece of pinned memory, so that copies to a GPU do not wait.
    """
    blocks: list[torch.Tensor] = []
    records: dict[str, list[int]] = {}

    def block(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> int:
        if tensor is None:
            return -1
        blocks.append(tensor.to(dtype or tensor.dtype).contiguous().view(-1).view(torch.uint8))
        return len(blocks) - 1

    for name, forms in weights.modules.items():
        record = [-1] * RECORD_FIELDS
        record[Field.RANK] = record[Field.DTYPE] = 0
        for form in forms:
            if isinstance(form, LowRank):
                record[Field.RANK] = form.rank
                record[Field.DTYPE] = FACTOR_DTYPES.index(form.a.dtype)
                record[Field.A] = block(_transposed(form.a) if name in embeddings else form.a)
                record[Field.B] = block(_transposed(form.b), form.a.dtype)
                record[Field.D] = block(form.d, torch.float32)
                record[Field.BIAS] = block(form.bias, torch.float32)
            elif isinstance(form, ReplacedWeight):
                record[Field.DTYPE] = FACTOR_DTYPES.index(form.weight.dtype)
                record[Field.WEIGHT] = block(form.weight)
                record[Field.WEIGHT_BIAS] = block(form.bias, torch.float32)
        records[name] = record
    return PackedAdapter(weights.digest, _pinned(blocks) if pinned else tuple(blocks), records)


def _transposed(factor: torch.Tensor) -> torch.Tensor:
    """Through numpy, which takes 15 us for 1536 x 16 of 16 bits where torch takes 50 (one thread, 2026-11-26)."""
    bits = factor.view(_BITS[factor.itemsize]).numpy()
    return torch.from_numpy(np.ascontiguousarray(bits.T)).view(factor.dtype)


def _pinned(blocks: list[torch.Tensor]) -> Blocks:
    whole = torch.empty(sum(len(block) for block in blocks), dtype=torch.uint8, pin_memory=True)
    places, start = [], 0
    for block in blocks:
        places.append(whole[start : start + len(block)].copy_(block))
        start += len(block)
    return tuple(places)


class AdapterStorage:
    """The device buffer of all adapters and the record tables that the adapter-aware modules read."""

    def __init__(self, buffer: torch.Tensor, table: AdapterTable, copier: Copier | None = None) -> None:
        self._buffer = buffer
        self._table = table
        self._copier = copier or DirectCopier()
        self._index = {name: index for index, name in enumerate(table.module_names)}

    def write(self, placement: Placement, adapter: PackedAdapter) -> Arrival | None:
        """Copy an adapter to its place and publish its records; the slot's former adapter is gone.

        Shared parts that lie there already are not written. The adapter may be used once the copies have arrived
        (None: now).
        """
        pairs, offsets = [], iter(placement.offsets)
        parts = [(adapter.own, True), *((part, key in placement.fresh) for key, part in adapter.shared.items())]
        for part, fresh in parts:
            for block, offset in zip(part, offsets, strict=False):
                if fresh:
                    pairs.append((self._buffer[offset : offset + block.numel()], block))
        arrival = self._copier.copy(pairs)
        placed = {}
        for name, record in adapter.records.items():
            own = placed[self._index[name]] = list(record)
            for column in _OFFSET_FIELDS:
                if record[column] >= 0:
                    own[column] = placement.offsets[record[column]]
        self._table.write(placement.slot, placed)
        return arrival
