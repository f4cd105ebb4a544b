"""What the adapter-aware modules and the attention of one model read during a step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kernels.segments import RECORD_FIELDS, Field, Segments
from server.model.kv_cache import KVCache

_EMPTY = tuple(0 if column in (Field.RANK, Field.DTYPE) else -1 for column in range(RECORD_FIELDS))


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the step's tokens stand in their requests and in the pages.

    query_start: int32 [R + 1], first flat row of each request; kv_length: int32 [R], its keys after this step;
    block_table: int32 [R, pages]; slots: int64 [T], `page * page_size + position in page` of each row.
    """

    query_start: torch.Tensor
    kv_length: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """What a step hands to the compiled code of every layer (`StepContext.tensors`)."""

    with_adapters: bool
    tensors: tuple[torch.Tensor, ...]


class AdapterTable:
    """Records of all resident adapters: `records`, int64 [modules, slots, RECORD_FIELDS], at a fixed address.

    A module's index is its place in `module_names` (`StepContext.module_index` has the same order).
    """

    def __init__(self, module_names: Sequence[str], slots: int, device: torch.device | str = "cpu") -> None:
        self.module_names = tuple(module_names)
        self.records = torch.tensor(_EMPTY, device=device).repeat(len(self.module_names), slots, 1)
        self._touched: list[set[int]] = [set() for _ in range(slots)]
        self._replaced: list[set[int]] = [set() for _ in range(slots)]

    def set(self, slot: int, module_index: int, record: Sequence[int]) -> None:
        """Write one module's record (in the order of `Field`) of the adapter in this slot."""
        self.records[module_index, slot] = torch.tensor(record, device=self.records.device)
        self._note(slot, module_index, record)

    def write(self, slot: int, records: Mapping[int, Sequence[int]]) -> None:
        """Put an adapter in this slot, by module index; the former one is gone. One copy, which does not wait."""
        host = torch.tensor(_EMPTY).repeat(len(self.module_names), 1)
        self._touched[slot].clear()
        self._replaced[slot].clear()
        for module_index, record in records.items():
            host[module_index] = torch.tensor(record)
            self._note(slot, module_index, record)
        self.records[:, slot].copy_(host.pin_memory() if self.records.is_cuda else host, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Forget the adapter in this slot."""
        self.write(slot, {})

    def _note(self, slot: int, module_index: int, record: Sequence[int]) -> None:
        if record[Field.RANK] > 0 or record[Field.BIAS] >= 0:
            self._touched[slot].add(module_index)
        if record[Field.WEIGHT] >= 0:
            self._replaced[slot].add(module_index)

    def touched(self, slots: Iterable[int]) -> frozenset[int]:
        """Modules to which an adapter in one of these slots adds something."""
        return frozenset().union(*(self._touched[slot] for slot in slots))

    def replaced(self, slots: Iterable[int]) -> frozenset[int]:
        """Modules whose weight an adapter in one of these slots exchanges."""
        return frozenset().union(*(self._replaced[slot] for slot in slots))


@dataclass(slots=True)
class StepContext:
    """One per prepared model: fixed facts, then what the engine attaches once, then what `begin` sets for a step."""

    module_names: tuple[str, ...]
    head: str | None
    module_index: dict[str, int] = field(init=False)

    cache: KVCache | None = None  # set by the model runner before the first step, as are the next two
    pool: torch.Tensor | None = None  # uint8 [bytes], adapter factors
    table: AdapterTable | None = None

    attention: AttentionMetadata | None = None
    segments: Segments | None = None  # rows of the flat batch; None: every row is base traffic
    head_segments: Segments | None = None  # rows that are kept for logits
    active: frozenset[int] = frozenset()  # modules that an adapter of this step adds to
    replaced: frozenset[int] = frozenset()  # modules that an adapter of this step exchanges

    compiled: frozenset[int] | None = None  # modules inside compiled layers; None: the layers are not compiled (yet)
    compiled_step: CompiledStep | None = None  # None: the step runs eagerly

    observed: dict[int, int | None] | None = None  # while verifying: window of each layer seen (`server.model.verify`)

    def __post_init__(self) -> None:
        self.module_index = {name: index for index, name in enumerate(self.module_names)}

    def begin(
        self,
        attention: AttentionMetadata,
        segments: Segments | None = None,
        head_segments: Segments | None = None,
        slots: Iterable[int] = (),
    ) -> None:
        """Set the step. `slots`: the distinct adapter slots in `segments`. Without segments no adapter code runs."""
        self.attention = attention
        self.segments = segments
        self.head_segments = head_segments
        if segments is not None and self.table is not None:
            slots = tuple(slots)
            self.active, self.replaced = self.table.touched(slots), self.table.replaced(slots)
        else:
            self.active = self.replaced = frozenset()
        self.compiled_step = self._compiled_step()

    def tensors(self, *, with_adapters: bool) -> tuple[torch.Tensor, ...]:
        """The step's own inputs of compiled layers; with adapters there must be segments and a pool."""
        assert self.attention is not None
        step = self.attention
        attention = (step.slots, step.query_start, step.kv_length, step.block_table)
        if not with_adapters:
            return attention
        assert self.segments is not None
        assert self.pool is not None
        segments = self.segments
        return (*attention, self.pool, segments.slot, segments.start, segments.token, segments.weight)

    def _compiled_step(self) -> CompiledStep | None:
        modules = self.compiled  # another thread may set it meanwhile
        if modules is None or self.replaced & modules:  # only the eager code exchanges weights inside the layers
            return None
        with_adapters = bool(self.active & modules)
        return CompiledStep(with_adapters, self.tensors(with_adapters=with_adapters))
