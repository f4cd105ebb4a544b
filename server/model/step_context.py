"""What the adapter-aware modules and the attention of one model read during a step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import torch

from kernels.segments import FORM_FIELDS, GATE_FIELDS, RECORD_FIELDS, Field, FormField, GateField, Limits, Segments
from server.model.kv_cache import KVCache
from server.model.virtual_tokens import ContextPlace, VirtualRows

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
class AttentionCall:
    """What a layer's attention is asked for in every step: factor of the scores, and a window and a bound of them.

    None as in `server.model.attention.polyrank_attention`.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """What a step hands to the compiled code of every layer (`StepContext.tensors`)."""

    with_adapters: bool
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Special:
    """What a module needs besides a sum of low-rank deltas, for the adapters of a step: rare, and eager code only."""

    replaced: bool = False
    gated: bool = False
    transformed: bool = False
    sparse: bool = False
    dense: bool = False
    scaled: bool = False

    def __or__(self, other: "Special") -> "Special":
        return Special(*(one or more for one, more in zip(astuple(self), astuple(other), strict=True)))


_PLAIN = Special()
NO_RECORDS: Mapping[int, Sequence[int]] = {}


class AdapterTable:
    """Records of all resident adapters, at fixed addresses: `records`, int64 [modules, slots, RECORD_FIELDS], `gates`
    and `forms`, the same of `GateField` and `FormField`.

    A module's index is its place in `module_names` (`StepContext.module_index` has the same order).
    """

    def __init__(self, module_names: Sequence[str], slots: int, device: torch.device | str = "cpu") -> None:
        self.module_names = tuple(module_names)
        count = len(self.module_names)
        self.records = torch.tensor(_EMPTY, device=device).repeat(count, slots, 1)
        # Zeros are records of nothing, and take no memory of a CPU until an adapter has such a part.
        self.gates = torch.zeros(count, slots, GATE_FIELDS, dtype=torch.int64, device=device)
        self.forms = torch.zeros(count, slots, FORM_FIELDS, dtype=torch.int64, device=device)
        self._touched: list[set[int]] = [set() for _ in range(slots)]
        self._special: list[dict[int, Special]] = [{} for _ in range(slots)]
        self._contexts: dict[int, ContextPlace] = {}
        self._factors, self._cores = 0, False  # of every record that was ever written
        self.known: frozenset[int] = frozenset()  # modules that any adapter so far had a low-rank delta or a bias for

    def kinds(self, width: int) -> Limits:
        """What the adapters that have been here so far are, `width` their highest rank.

        Kernels are chosen by it: a server of plain LoRAs does without the code and the launches that cores and factors
        of other types need. It only grows, so that a row's bits depend on what the server has seen, not on the batch.
        """
        return Limits(width, self._factors, self._cores)

    def set(self, slot: int, module_index: int, record: Sequence[int]) -> None:
        """Write one module's record (in the order of `Field`) of the adapter in this slot."""
        self.records[module_index, slot] = torch.tensor(record, device=self.records.device)
        self._note(slot, module_index, record)

    def write(
        self,
        slot: int,
        records: Mapping[int, Sequence[int]],
        gates: Mapping[int, Sequence[int]] = NO_RECORDS,
        forms: Mapping[int, Sequence[int]] = NO_RECORDS,
        context: ContextPlace | None = None,
    ) -> None:
        """Put an adapter in this slot, by module index; the former one is gone. Copies that do not wait."""
        self._contexts.pop(slot, None)
        if context is not None:
            self._contexts[slot] = context
        before = self._special[slot]
        self._touched[slot].clear()
        self._special[slot] = {}
        for module_index, record in records.items():
            self._note(slot, module_index, record)
        for module_index, gate in gates.items():
            self._add(slot, module_index, Special(gated=gate[GateField.ROWS] > 0))
            if gate[GateField.ROWS] > 0:
                self._factors |= 1 << gate[GateField.DTYPE]  # of the router, which may be another than the factors'
        for module_index, form in forms.items():
            self._add(slot, module_index, _special(form))
        self._copy(self.records, slot, records, _EMPTY)
        if before or self._special[slot]:
            self._copy(self.gates, slot, gates, (0,) * GATE_FIELDS)
            self._copy(self.forms, slot, forms, (0,) * FORM_FIELDS)

    def clear(self, slot: int) -> None:
        """Forget the adapter in this slot."""
        self.write(slot, {})

    def context(self, slot: int) -> ContextPlace | None:
        """The virtual tokens of the adapter in this slot."""
        return self._contexts.get(slot)

    def touched(self, slots: Iterable[int]) -> frozenset[int]:
        """Modules to which an adapter in one of these slots adds a low-rank delta or a bias."""
        return frozenset().union(*(self._touched[slot] for slot in slots))

    def special(self, slots: Iterable[int]) -> dict[int, Special]:
        """Modules for which adapters in these slots have more than that, and what."""
        found: dict[int, Special] = {}
        for slot in slots:
            for module_index, special in self._special[slot].items():
                found[module_index] = found.get(module_index, _PLAIN) | special
        return found

    def _note(self, slot: int, module_index: int, record: Sequence[int]) -> None:
        if record[Field.RANK] > 0 or record[Field.BIAS] >= 0:
            self._touched[slot].add(module_index)
            if module_index not in self.known:
                self.known |= {module_index}
        if record[Field.RANK] > 0 or record[Field.WEIGHT] >= 0:
            self._factors |= 1 << record[Field.DTYPE]
        self._cores = self._cores or record[Field.CORE] >= 0
        self._add(slot, module_index, Special(replaced=record[Field.WEIGHT] >= 0))

    def _add(self, slot: int, module_index: int, special: Special) -> None:
        if special != _PLAIN:
            self._special[slot][module_index] = self._special[slot].get(module_index, _PLAIN) | special

    def _copy(self, table: torch.Tensor, slot: int, rows: Mapping[int, Sequence[int]], empty: tuple[int, ...]) -> None:
        host = torch.tensor(empty).repeat(len(table), 1)
        for module_index, row in rows.items():
            host[module_index] = torch.tensor(row)
        table[:, slot].copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)


def _special(form: Sequence[int]) -> Special:
    return Special(
        transformed=form[FormField.TRANSFORM_SIZE] > 0,
        sparse=form[FormField.SPARSE_ROWS] > 0,
        dense=form[FormField.DENSE_ROWS] > 0,
        scaled=form[FormField.SCALE_STRIDE] > 0,
    )


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
    active: frozenset[int] = frozenset()  # modules that an adapter of this step adds low-rank deltas to
    special: Mapping[int, Special] = field(default_factory=dict)  # modules that need more than that, and what
    embedded: Sequence[VirtualRows] = ()  # rows whose embeddings an adapter of this step exchanges
    prefixed: Sequence[VirtualRows] = ()  # rows whose keys and values it exchanges, in every layer

    embeds: bool = False  # the first layer is an embedding that can exchange its rows
    compiled: frozenset[int] | None = (
        None  # modules and norms inside compiled layers; None: the layers are not compiled (yet)
    )
    compiled_step: CompiledStep | None = None  # None: the step runs eagerly

    observed: dict[int, AttentionCall] | None = None  # while verifying: each layer seen (`server.model.verify`)

    def __post_init__(self) -> None:
        self.module_index = {name: index for index, name in enumerate(self.module_names)}

    def begin(
        self,
        attention: AttentionMetadata,
        segments: Segments | None = None,
        head_segments: Segments | None = None,
        slots: Iterable[int] = (),
        virtual: Iterable[VirtualRows] = (),
    ) -> None:
        """Set the step. `slots`: the distinct adapter slots in `segments`. Without segments no adapter code runs.

        virtual: rows that stand for virtual tokens; they are among `segments`.
        """
        self.attention = attention
        self.segments = segments
        self.head_segments = head_segments
        if segments is not None and self.table is not None:
            slots = tuple(slots)
            self.active, self.special = self.table.touched(slots), self.table.special(slots)
        else:
            self.active, self.special = frozenset(), {}
        self.embedded, self.prefixed = (), ()
        for rows in virtual:
            if rows.place.is_prefix:
                self.prefixed = (*self.prefixed, rows)
            elif self.embeds:
                self.embedded = (*self.embedded, rows)
            else:
                raise RuntimeError("the first layer of this base cannot exchange its rows")
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
        if modules is None or self.prefixed or not modules.isdisjoint(self.special):  # known to the eager code only
            return None
        with_adapters = bool(self.active & modules)
        return CompiledStep(with_adapters, self.tensors(with_adapters=with_adapters))
