"""Which token of a step belongs to which adapter, and where that adapter's factors lie in the pool."""

from dataclasses import dataclass, field
from enum import IntEnum

import torch


class Field(IntEnum):
    """Columns of a module record (int64). Offsets are bytes from the start of the pool; -1 means absent."""

    A = 0  # LowRank A [r, in] (embeddings: A transposed, [vocabulary, r])
    B = 1  # LowRank B transposed, [r, out]: unit stride over the outputs
    D = 2  # per-rank scale [r], always float32
    BIAS = 3  # added after the product [out], always float32
    RANK = 4  # r; 0: no low-rank part here
    DTYPE = 5  # type of A, B and WEIGHT: an index of `FACTOR_DTYPES`, or INT4
    WEIGHT = 6  # full replacement weight [out, in] (a saved head)
    WEIGHT_BIAS = 7  # bias of the replacement [out], always float32; -1: none
    CORE = 8  # C transposed [r, r], which stands between A and B of a shared basis, always float32; -1: none


RECORD_FIELDS = len(Field)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)  # int8: a scale per rank row, folded into D
# Numbers of four bits, for which torch has no type: `reference.int4_values` says how a block lies. Neither an
# embedding's A, whose rows of r numbers are too short for groups, nor a weight.
INT4 = len(FACTOR_DTYPES)
FACTOR_TYPES = INT4 + 1
INT4_GROUP = 64  # neighbouring numbers of a row that share a scale
INT4_RUN = 32  # neighbouring numbers that lie interleaved, in 16 bytes
ALIGNMENT = 64  # bytes; every block starts on a cache line


class GateField(IntEnum):
    """Columns of a gate record (int64), beside the module record of a `LowRank` part whose ranks it gates."""

    ROUTER = 0  # [router rows, in]
    BIAS = 1  # per-rank bias of the scores [r], always float32; -1: none
    ROWS = 2  # router rows, a divisor of r; 0: no gate here
    DTYPE = 3  # `FACTOR_DTYPES` index of ROUTER; not int8 or INT4, whose scales only `d` could hold
    RANK = 4  # r
    ACTIVE = 5  # k, how many ranks a token uses
    # How often each rank was chosen [r], int64, -1: not counted. The only bytes of the pool that a kernel writes; an
    # operation counts each time it runs, once for each row of each segment.
    COUNTS = 6


GATE_FIELDS = len(GateField)


class FormField(IntEnum):
    """Columns of a form record (int64): what a module has besides its low-rank part. Offsets as in `Field`.

    Every part has a count that is 0 where there is none, so a record of zeros is one without any.
    """

    SPARSE_START = 0  # where each row of S begins, int32 [rows + 1]
    SPARSE_COLUMN = 1  # int32 [count], ascending within a row; kernels do not look whether they are columns
    SPARSE_VALUE = 2  # [count], always float32
    SPARSE_ROWS = 3  # rows of S: out, or the vocabulary of an embedding; 0: no sparse delta here
    SPARSE_COUNT = 4  # numbers in S
    DENSE = 5  # D [out, in], or its signs: uint8 [out, ceil(in / 8)]
    DENSE_SCALE = 6  # factor of each row of D [out], always float32
    DENSE_DTYPE = 7  # an index of `FACTOR_DTYPES`, or ONE_BIT
    DENSE_ROWS = 8  # out; 0: no dense delta here
    TRANSFORM = 9  # blocks of R in order, each transposed [in / size, size, size], always float32
    TRANSFORM_SIZE = 10  # rows of a block, a divisor of in; 0: no transform here
    SCALE = 11  # factor of each output [out], always float32; -1: ones
    SCALE_BIAS = 12  # added to each output [out], always float32; -1: none
    SCALE_PAIR = 13  # factor of each output's partner [out], always float32; -1: none
    SCALE_STRIDE = 14  # distance of partners; 0: no scale here


FORM_FIELDS = len(FormField)
ONE_BIT = FACTOR_TYPES  # a dense delta's signs: bit j % 8 of byte j // 8 of a row is set for +1, else -1


@dataclass(frozen=True, slots=True)
class Limits:
    """What the adapters of a server may be: facts of the server, not of a batch, so that a row's bits stay its own.

    They grow when an adapter of a new kind comes.

    width: highest rank (on a GPU a higher one makes its rows NaN); factors: a bit per type that factors and routers
    have, which spares kernels the code for the others (bytes of another type would be read as one of these); cores:
    whether records may have a CORE, which a GPU has no fused kernel for (without it a core would not be applied).
    """

    width: int = 256
    factors: int = (1 << FACTOR_TYPES) - 1
    cores: bool = True


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of a step in pieces of at most 16 that take the same adapters in the same order.

    Chunk `c` is `table[c] = (first, rows, layers)`: its entries lie at `first + layer * rows + row` of the other
    tensors, where `layer` counts the adapters that each of its rows takes (1 but for weighted compositions). A row
    of the batch stands in one chunk only. Chunks with `rows` 0 and slots of -1 fill the tensors up.

    table: int32 [chunks, 3]; slot, token: int32 [entries]; weight: float32 [entries].
    """

    table: torch.Tensor
    slot: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of a flat token batch, grouped by adapter.

    Segment `i` applies the adapter in slot `slot[i]` to rows `token[start[i]:start[i + 1]]`, each with its
    own `weight`. A row may stand in several segments (a weighted composition) or in none (base). Segments
    are ordered by adapter digest, so the order of a row's sums never depends on its batch-mates.

    slot: int32 [S]; start: int32 [S + 1]; token: int32 [N]; weight: float32 [N].
    """

    slot: torch.Tensor
    start: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    chunks: Chunks | None = None  # the same step as the GPU kernels take it (`dispatch.place`)

    def __len__(self) -> int:
        return self.slot.shape[0]
