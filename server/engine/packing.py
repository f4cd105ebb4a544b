"""An adapter laid out as the kernels read it, in blocks of bytes that the device pool places as they are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from adapters_store.forms import AdapterWeights, Form, Int4LowRank, Int4Rows, LowRank, SharedBasis
from kernels.segments import ALIGNMENT, FACTOR_DTYPES, INT4, RECORD_FIELDS, Field

OFFSET_FIELDS = (Field.A, Field.B, Field.D, Field.BIAS, Field.WEIGHT, Field.WEIGHT_BIAS, Field.CORE)
SPAN = 1 << 40  # more than the bytes of any block
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes of an element -> a type that numpy knows

Blocks = tuple[torch.Tensor, ...]  # each uint8 [bytes]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as blocks of bytes, with records that say where in them a module's factors lie.

    own: its blocks; shared: further ones, in parts that other adapters may have too, by a digest of their bytes;
    records: module name -> record in the order of `Field`, an offset being `SPAN * index + bytes from the start` of one
    of `blocks`.
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


def pack(
    weights: AdapterWeights, embeddings: frozenset[str], page_bytes: int, *, pinned: bool = False
) -> PackedAdapter:
    """Lay out factors as the kernels read them: B transposed, and on `embeddings` (module names) A transposed too.

    Pieces that fit a page of `page_bytes` go into blocks of at most one page: so an adapter is some dozens of blocks to
    place and to copy, not hundreds (rank 16 on 210 modules: 0.2 instead of 1.8 ms and 2 instead of 6 ms of the engine's
    thread). pinned: in pinned memory, so that copies to a GPU do not wait.
    """
    own, basis = _Part(), _Part()
    records: dict[str, list[tuple[_Part, int] | int]] = {}
    for name, forms in weights.modules.items():
        record = records[name] = [-1] * RECORD_FIELDS
        record[Field.RANK] = record[Field.DTYPE] = 0
        for form in forms:
            _add(form, record, own, basis, name in embeddings)
    own_blocks = own.lay_out(page_bytes, 0, pinned)
    shared = basis.lay_out(page_bytes, len(own_blocks), pinned)
    placed = {name: [_place(entry) for entry in record] for name, record in records.items()}
    return PackedAdapter(weights.digest, own_blocks, placed, {basis.key(): shared} if shared else {})


class _Part:
    """Pieces of bytes that are placed together."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.places: list[int] = []

    def add(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> "tuple[_Part, int] | int":
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


def _add(form: Form, record: list[tuple[_Part, int] | int], own: _Part, basis: _Part, is_embedding: bool) -> None:
    if isinstance(form, LowRank):
        record[Field.RANK], record[Field.DTYPE] = form.rank, FACTOR_DTYPES.index(form.a.dtype)
        record[Field.A] = own.add(_transposed(form.a) if is_embedding else form.a)
        record[Field.B] = own.add(_transposed(form.b), form.a.dtype)
        record[Field.D], record[Field.BIAS] = own.add(form.d, torch.float32), own.add(form.bias, torch.float32)
    elif isinstance(form, Int4LowRank):
        record[Field.RANK], record[Field.DTYPE] = form.rank, INT4
        record[Field.A], record[Field.B] = own.add(_int4_piece(form.a)), own.add(_int4_piece(form.b))
        record[Field.D], record[Field.BIAS] = own.add(form.d, torch.float32), own.add(form.bias, torch.float32)
    elif isinstance(form, SharedBasis):
        record[Field.RANK], record[Field.DTYPE] = form.rank, FACTOR_DTYPES.index(form.v.dtype)
        record[Field.A] = basis.add(_transposed(form.v) if is_embedding else form.v)
        record[Field.B] = basis.add(_transposed(form.u))
        is_diagonal = form.core.dim() == 1
        record[Field.D] = own.add(form.core if is_diagonal else torch.ones(form.rank))
        record[Field.CORE] = -1 if is_diagonal else own.add(form.core.T)
        record[Field.BIAS] = own.add(form.bias, torch.float32)
    else:
        record[Field.DTYPE] = FACTOR_DTYPES.index(form.weight.dtype)
        record[Field.WEIGHT], record[Field.WEIGHT_BIAS] = own.add(form.weight), own.add(form.bias, torch.float32)


def _place(entry: tuple[_Part, int] | int) -> int:
    return entry if isinstance(entry, int) else entry[0].places[entry[1]]


def _transposed(factor: torch.Tensor) -> torch.Tensor:
    """Through numpy, which takes 15 us for 1536 x 16 of 16 bits where torch takes 50 (one thread, 2026-11-26)."""
    bits = factor.view(_BITS[factor.itemsize]).numpy()
    return torch.from_numpy(np.ascontiguousarray(bits.T)).view(factor.dtype)


def _int4_piece(rows: Int4Rows) -> torch.Tensor:
    return torch.cat([rows.numbers.flatten(), rows.scales.flatten()])
