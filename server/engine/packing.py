"""An adapter laid out as the kernels read it, in blocks of bytes that the device pool places as they are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import (
    AdapterWeights,
    Context,
    Delta,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    Int4LowRank,
    Int4Rows,
    LowRank,
    OutputScale,
    ReplacedWeight,
    SharedBasis,
    SignRows,
    Sparse,
)
from kernels.segments import (
    ALIGNMENT,
    FACTOR_DTYPES,
    GATE_FIELDS,
    INT4,
    ONE_BIT,
    RECORD_FIELDS,
    Field,
    FormField,
    GateField,
)
from server.model.virtual_tokens import ContextPlace

OFFSET_FIELDS = (Field.A, Field.B, Field.D, Field.BIAS, Field.WEIGHT, Field.WEIGHT_BIAS, Field.CORE)
GATE_OFFSETS = (GateField.ROUTER, GateField.BIAS, GateField.COUNTS)
FORM_OFFSETS = (
    FormField.SPARSE_START,
    FormField.SPARSE_COLUMN,
    FormField.SPARSE_VALUE,
    FormField.DENSE,
    FormField.DENSE_SCALE,
    FormField.TRANSFORM,
    FormField.SCALE,
    FormField.SCALE_BIAS,
    FormField.SCALE_PAIR,
)
SPAN = 1 << 40  # more than the bytes of any block
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes of an element -> a type that numpy knows

Blocks = tuple[torch.Tensor, ...]  # each uint8 [bytes]
Entry = tuple["_Part", int] | int  # of a record, until its piece has a place


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as blocks of bytes, with records that say where in them a module's factors lie.

    own: its blocks; shared: further ones, in parts that other adapters may have too, by a digest of their bytes;
    records: module name -> record in the order of `Field`, an offset being `SPAN * index + bytes from the start` of one
    of `blocks`; gates, forms: the same in the order of `GateField` and `FormField`, for modules that have such parts;
    context: its virtual tokens, with offsets of the same kind.
    """

    digest: str
    own: Blocks
    records: dict[str, list[int]]
    shared: Mapping[bytes, Blocks] = field(default_factory=dict)
    gates: Mapping[str, list[int]] = field(default_factory=dict)
    forms: Mapping[str, list[int]] = field(default_factory=dict)
    context: ContextPlace | None = None

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


def pack(
    weights: AdapterWeights, embeddings: frozenset[str], page_bytes: int, *, pinned: bool = False
) -> PackedAdapter:
    """Lay out forms as the kernels read them: B transposed, and on `embeddings` (module names) A transposed too.

    Pieces that fit a page of `page_bytes` go into blocks of at most one page: so an adapter is some dozens of blocks to
    place and to copy, not hundreds (rank 16 on 210 modules: 0.2 instead of 1.8 ms and 2 instead of 6 ms of the engine's
    thread). pinned: in pinned memory, so that copies to a GPU do not wait. Raises AdapterInvalid `feature_unsupported`
    where a module has two forms of one kind.
    """
    own, basis = _Part(), _Part()
    tables = _Tables({}, {}, {})
    for name, forms in weights.modules.items():
        _check_one(name, forms)
        for form in forms:
            _add(form, name, tables, own, basis, name in embeddings)
    parts = [] if weights.context is None else _context_parts(weights.context)
    context = [own.add(part, parts[0].dtype) for part in parts]
    own_blocks = own.lay_out(page_bytes, 0, pinned)
    shared = basis.lay_out(page_bytes, len(own_blocks), pinned)
    return PackedAdapter(
        weights.digest,
        own_blocks,
        _placed(tables.records),
        {basis.key(): shared} if shared else {},
        _placed(tables.gates),
        _placed(tables.forms),
        _context_place(weights.context, context),
    )


def _check_one(name: str, forms: tuple[Form, ...]) -> None:
    """Records have room for one low-rank part, one of each other form, and one type."""
    kinds = [Delta if isinstance(form, Delta | GatedLowRank) else type(form) for form in forms]
    if len(set(kinds)) != len(kinds):
        raise AdapterInvalid(f"`{name}` has two forms of one kind.", code="feature_unsupported")
    types = {_type(form) for form in forms if isinstance(form, Delta | GatedLowRank | ReplacedWeight)}
    if len(types) > 1:
        raise AdapterInvalid(f"`{name}` has a replaced weight and factors of unlike types.", code="feature_unsupported")


def _type(form: Delta | GatedLowRank | ReplacedWeight) -> int:
    """What `Field.DTYPE` says, which factors and a replaced weight share."""
    if isinstance(form, Int4LowRank):
        return INT4
    factor = form.weight if isinstance(form, ReplacedWeight) else form.v if isinstance(form, SharedBasis) else form.a
    return FACTOR_DTYPES.index(factor.dtype)


class _Part:
    """Pieces of bytes that are placed together."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.places: list[int] = []

    def add(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> Entry:
        """What a record holds until the piece has its place; -1 for nothing."""
        if tensor is None:
            return -1
        self.pieces.append(tensor.to(dtype or tensor.dtype).contiguous().view(-1).view(torch.uint8))
        return self, len(self.pieces) - 1

    def key(self) -> bytes:
        """Equal for equal bytes in an equal order."""
        digest = hashlib.blake2b(digest_size=32)
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(8, "little") + piece.numpy().tobytes())
        return digest.digest()

    def lay_out(self, page_bytes: int, first: int, pinned: bool) -> Blocks:
        """Blocks of all pieces, and in `places` where each piece lies; the blocks are numbered from `first`.

        First fit, largest first; a piece larger than a page is a block by itself.
        """
        sizes: list[int] = []
        self.places = [0] * len(self.pieces)
        room = [-(-len(piece) // ALIGNMENT) * ALIGNMENT for piece in self.pieces]
        open_from = 0  # blocks before it are full
        for index in sorted(range(len(room)), key=lambda i: (-room[i], i)):
            number = next((b for b in range(open_from, len(sizes)) if sizes[b] + room[index] <= page_bytes), len(sizes))
            if number == len(sizes):
                sizes.append(0)
            self.places[index] = (first + number) * SPAN + sizes[number]
            sizes[number] += room[index]
            while open_from < len(sizes) and sizes[open_from] + ALIGNMENT > page_bytes:
                open_from += 1
        blocks = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for piece, place in zip(self.pieces, self.places, strict=True):
            number, start = divmod(place, SPAN)
            blocks[number - first][start : start + len(piece)] = piece
        return tuple(blocks)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Records by module name, of each kind."""

    records: dict[str, list[Entry]]
    gates: dict[str, list[Entry]]
    forms: dict[str, list[Entry]]

    def record(self, name: str) -> list[Entry]:
        """The module's record, at first one of nothing."""
        empty: list[Entry] = [-1] * RECORD_FIELDS
        empty[Field.RANK] = empty[Field.DTYPE] = 0
        return self.records.setdefault(name, empty)

    def form(self, name: str) -> list[Entry]:
        """The same of form records."""
        return self.forms.setdefault(name, [-1 if column in FORM_OFFSETS else 0 for column in FormField])


def _add(form: Form, name: str, tables: _Tables, own: _Part, basis: _Part, is_embedding: bool) -> None:
    match form:
        case SharedBasis():
            _add_shared(form, tables.record(name), own, basis, is_embedding)
        case LowRank() | Int4LowRank() | GatedLowRank():
            _add_low_rank(form, tables.record(name), own, is_embedding)
            if isinstance(form, GatedLowRank):
                tables.gates[name] = _gate(form, own)
        case ReplacedWeight():
            record = tables.record(name)
            record[Field.DTYPE] = _type(form)
            record[Field.WEIGHT], record[Field.WEIGHT_BIAS] = own.add(form.weight), own.add(form.bias, torch.float32)
        case Sparse(column=column) if len(column) == 0:
            pass  # nothing to place, and nothing to do
        case _:
            _add_form(form, tables.form(name), own)


def _add_low_rank(
    form: LowRank | Int4LowRank | GatedLowRank, record: list[Entry], own: _Part, is_embedding: bool
) -> None:
    record[Field.RANK], record[Field.DTYPE] = form.rank, _type(form)
    if isinstance(form, Int4LowRank):
        record[Field.A], record[Field.B] = own.add(_int4_piece(form.a)), own.add(_int4_piece(form.b))
    else:
        record[Field.A] = own.add(_transposed(form.a) if is_embedding else form.a)
        record[Field.B] = own.add(_transposed(form.b), form.a.dtype)
    record[Field.D], record[Field.BIAS] = own.add(form.d, torch.float32), own.add(form.bias, torch.float32)


def _add_shared(form: SharedBasis, record: list[Entry], own: _Part, basis: _Part, is_embedding: bool) -> None:
    record[Field.RANK], record[Field.DTYPE] = form.rank, _type(form)
    record[Field.A] = basis.add(_transposed(form.v) if is_embedding else form.v)
    record[Field.B] = basis.add(_transposed(form.u))
    is_diagonal = form.core.dim() == 1
    record[Field.D] = own.add(form.core if is_diagonal else torch.ones(form.rank))
    record[Field.CORE] = -1 if is_diagonal else own.add(form.core.T)
    record[Field.BIAS] = own.add(form.bias, torch.float32)


def _gate(form: GatedLowRank, own: _Part) -> list[Entry]:
    gate: list[Entry] = [0] * GATE_FIELDS
    gate[GateField.ROUTER], gate[GateField.BIAS] = own.add(form.router), own.add(form.router_bias, torch.float32)
    gate[GateField.ROWS], gate[GateField.DTYPE] = len(form.router), FACTOR_DTYPES.index(form.router.dtype)
    gate[GateField.RANK], gate[GateField.ACTIVE] = form.rank, form.active
    # Counted in the adapter's own bytes: so the counters come, move and go with it.
    gate[GateField.COUNTS] = own.add(torch.zeros(form.rank, dtype=torch.int64))
    return gate


def _add_form(form: Sparse | Dense | InputTransform | OutputScale, record: list[Entry], own: _Part) -> None:
    match form:
        case Sparse(start, column, value):
            record[FormField.SPARSE_START] = own.add(start, torch.int32)
            record[FormField.SPARSE_COLUMN] = own.add(column, torch.int32)
            record[FormField.SPARSE_VALUE] = own.add(value, torch.float32)
            record[FormField.SPARSE_ROWS], record[FormField.SPARSE_COUNT] = len(start) - 1, len(column)
        case Dense(weight, scale):
            numbers = weight.bits if isinstance(weight, SignRows) else weight
            kind = ONE_BIT if isinstance(weight, SignRows) else FACTOR_DTYPES.index(weight.dtype)
            record[FormField.DENSE], record[FormField.DENSE_SCALE] = own.add(numbers), own.add(scale, torch.float32)
            record[FormField.DENSE_DTYPE], record[FormField.DENSE_ROWS] = kind, len(numbers)
        case InputTransform(blocks):
            record[FormField.TRANSFORM] = own.add(blocks.mT, torch.float32)
            record[FormField.TRANSFORM_SIZE] = blocks.shape[-1]
        case OutputScale(scale, bias, pair, stride):
            record[FormField.SCALE] = own.add(scale, torch.float32)
            record[FormField.SCALE_BIAS] = own.add(bias, torch.float32)
            record[FormField.SCALE_PAIR] = own.add(pair, torch.float32)
            record[FormField.SCALE_STRIDE] = stride


def _context_parts(context: Context) -> list[torch.Tensor]:
    """Embeddings; or keys and values of each layer, so that no piece is larger than need be."""
    if context.embeddings is not None:
        return [context.embeddings]
    assert context.keys is not None
    assert context.values is not None
    return [part for layer in zip(context.keys, context.values, strict=True) for part in layer]


def _context_place(context: Context | None, entries: list[Entry]) -> ContextPlace | None:
    if context is None:
        return None
    return ContextPlace(context.num_tokens, _context_parts(context)[0].dtype, tuple(map(_place, entries)))


def _placed(records: Mapping[str, list[Entry]]) -> dict[str, list[int]]:
    return {name: [_place(entry) for entry in record] for name, record in records.items()}


def _place(entry: Entry) -> int:
    return entry if isinstance(entry, int) else entry[0].places[entry[1]]


def _transposed(factor: torch.Tensor) -> torch.Tensor:
    """Through numpy, which takes 15 us for 1536 x 16 of 16 bits where torch takes 50 (one thread, 2026-11-26)."""
    bits = factor.view(_BITS[factor.itemsize]).numpy()
    return torch.from_numpy(np.ascontiguousarray(bits.T)).view(factor.dtype)


def _int4_piece(rows: Int4Rows) -> torch.Tensor:
    return torch.cat([rows.numbers.flatten(), rows.scales.flatten()])
