"""Adapter weights on the device: one flat buffer of bytes, and for each module a table of where its factors lie."""

from collections.abc import Mapping, Sequence

import torch

from server.engine.adapter_pool import Placement
from server.engine.copiers import Arrival, Copier, DirectCopier
from server.engine.packing import FORM_OFFSETS, GATE_OFFSETS, OFFSET_FIELDS, SPAN, PackedAdapter
from server.model.step_context import AdapterTable


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
        fresh = [True] * len(adapter.own)
        for key, part in adapter.shared.items():
            fresh += [key in placement.fresh] * len(part)
        places = zip(placement.offsets, adapter.blocks, fresh, strict=True)
        pairs = [(self._buffer[offset : offset + len(block)], block) for offset, block, is_fresh in places if is_fresh]
        arrival = self._copier.copy(pairs)
        offsets = placement.offsets
        self._table.write(
            placement.slot,
            self._placed(adapter.records, OFFSET_FIELDS, offsets),
            self._placed(adapter.gates, GATE_OFFSETS, offsets),
            self._placed(adapter.forms, FORM_OFFSETS, offsets),
        )
        return arrival

    def _placed(
        self, records: Mapping[str, Sequence[int]], columns: Sequence[int], offsets: Sequence[int]
    ) -> dict[int, list[int]]:
        """Records by module index, with what `columns` hold counted from the start of the buffer."""
        placed = {}
        for name, record in records.items():
            own = placed[self._index[name]] = list(record)
            for column in columns:
                if record[column] >= 0:
                    number, start = divmod(record[column], SPAN)
                    own[column] = offsets[number] + start
        return placed
