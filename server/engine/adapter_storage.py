"""Adapter weights on the device: one flat buffer of bytes, and for each module a table of where its factors lie."""

from dataclasses import dataclass

import torch

from adapters_store.forms import AdapterWeights, Int4LowRank, Int4Rows, LowRank, ReplacedWeight, SharedBasis
from kernels.segments import FACTOR_DTYPES, INT4, RECORD_FIELDS, Field
from server.engine.adapter_pool import Placement
from server.model.step_context import AdapterTable


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as blocks of bytes in the kernels' layout, with records that refer to blocks by index.

    blocks: uint8 tensors; records: module name -> record in the order of `Field`, its offsets being block indices.
    """

    digest: str
    blocks: tuple[torch.Tensor, ...]
    records: dict[str, list[int]]

    @property
    def sizes(self) -> list[int]:
        return [block.numel() for block in self.blocks]


_OFFSET_FIELDS = (Field.A, Field.B, Field.D, Field.BIAS, Field.WEIGHT, Field.WEIGHT_BIAS, Field.CORE)


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
                record[Field.A] = block(form.a.T if name in embeddings else form.a)
                record[Field.B] = block(form.b.T, form.a.dtype)
                record[Field.D] = block(form.d, torch.float32)
                record[Field.BIAS] = block(form.bias, torch.float32)
            elif isinstance(form, Int4LowRank):
                record[Field.RANK], record[Field.DTYPE] = form.rank, INT4
                record[Field.A], record[Field.B] = block(_int4_block(form.a)), block(_int4_block(form.b))
                record[Field.D], record[Field.BIAS] = block(form.d, torch.float32), block(form.bias, torch.float32)
            elif isinstance(form, SharedBasis):
                record[Field.RANK], record[Field.DTYPE] = form.rank, FACTOR_DTYPES.index(form.v.dtype)
                record[Field.A] = block(form.v.T if name in embeddings else form.v)
                record[Field.B] = block(form.u.T)
                is_diagonal = form.core.dim() == 1
                record[Field.D] = block(form.core if is_diagonal else torch.ones(form.rank))
                record[Field.CORE] = -1 if is_diagonal else block(form.core.T)
                record[Field.BIAS] = block(form.bias, torch.float32)
            elif isinstance(form, ReplacedWeight):
                record[Field.DTYPE] = FACTOR_DTYPES.index(form.weight.dtype)
                record[Field.WEIGHT] = block(form.weight)
                record[Field.WEIGHT_BIAS] = block(form.bias, torch.float32)
        records[name] = record
    return PackedAdapter(weights.digest, _pinned(blocks) if pinned else tuple(blocks), records)


def _int4_block(rows: Int4Rows) -> torch.Tensor:
    return torch.cat([rows.numbers.flatten(), rows.scales.flatten()])


def _pinned(blocks: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    whole = torch.empty(sum(len(block) for block in blocks), dtype=torch.uint8, pin_memory=True)
    places, start = [], 0
    for block in blocks:
        places.append(whole[start : start + len(block)].copy_(block))
        start += len(block)
    return tuple(places)


class AdapterStorage:
    """The device buffer of all adapters and the record tables that the adapter-aware modules read."""

    def __init__(self, buffer: torch.Tensor, table: AdapterTable) -> None:
        self._buffer = buffer
        self._table = table
        self._index = {name: index for index, name in enumerate(table.module_names)}

    def write(self, placement: Placement, adapter: PackedAdapter) -> None:
        """Copy an adapter to its place and publish its records; the slot's former adapter is gone."""
        # On a GPU no copy waits; the next step, on the same stream, follows them. Torch keeps pinned memory until then.
        for offset, block in zip(placement.offsets, adapter.blocks, strict=True):
            self._buffer[offset : offset + block.numel()].copy_(block, non_blocking=True)
        placed = {}
        for name, record in adapter.records.items():
            own = placed[self._index[name]] = list(record)
            for column in _OFFSET_FIELDS:
                if record[column] >= 0:
                    own[column] = placement.offsets[record[column]]
        self._table.write(placement.slot, placed)
