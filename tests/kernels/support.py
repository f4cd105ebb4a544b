"""Random adapters packed into a pool as the engine packs them: shared by the kernel tests and the benches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from kernels import reference
from kernels.segments import ALIGNMENT, FACTOR_DTYPES, INT4_GROUP, RECORD_FIELDS, Field, Segments

Result = TypeVar("Result")

FACTORS: tuple[torch.dtype | str, ...] = (*FACTOR_DTYPES, "int4")  # all that a low-rank part may be stored in


@dataclass(frozen=True)
class Adapter:
    """One adapter's parts for one module, in the types they are stored in."""

    a: torch.Tensor | None = None  # [r, in], or [vocabulary, r] for an embedding
    b: torch.Tensor | None = None  # [r, out]
    d: torch.Tensor | None = None  # [r] float32
    bias: torch.Tensor | None = None  # [out] float32
    weight: torch.Tensor | None = None  # [out, in]
    weight_bias: torch.Tensor | None = None  # [out] float32
    core: torch.Tensor | None = None  # [r, r] float32, transposed
    dtype: torch.dtype | str = torch.float32  # "int4": a and b are blocks of bytes


@dataclass
class PoolBuilder:
    """Packs blocks into one uint8 buffer, each aligned; gaps are filled with bytes that would show if read."""

    chunks: list[torch.Tensor] = field(default_factory=list)
    size: int = 0

    def put(self, block: torch.Tensor | None) -> int:
        if block is None:
            return -1
        offset = self.size
        data = block.contiguous().view(-1).view(torch.uint8)
        gap = -len(data) % ALIGNMENT + ALIGNMENT
        self.chunks += [data, torch.full((gap,), 0xFF, dtype=torch.uint8)]  # NaN in every factor type
        self.size += len(data) + gap
        return offset

    def add(self, adapter: Adapter) -> list[int]:
        """The module record of this adapter."""
        record = [-1] * RECORD_FIELDS
        record[Field.A], record[Field.B] = self.put(adapter.a), self.put(adapter.b)
        record[Field.D], record[Field.BIAS] = self.put(adapter.d), self.put(adapter.bias)
        record[Field.RANK] = 0 if adapter.d is None else len(adapter.d)
        record[Field.DTYPE] = FACTORS.index(adapter.dtype)
        record[Field.WEIGHT], record[Field.WEIGHT_BIAS] = self.put(adapter.weight), self.put(adapter.weight_bias)
        record[Field.CORE] = self.put(adapter.core)
        return record

    def pool(self) -> torch.Tensor:
        return torch.cat(self.chunks) if self.chunks else torch.empty(0, dtype=torch.uint8)


def pack(adapters: Sequence[Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool and records [slots, RECORD_FIELDS]; slot i is adapter i."""
    builder = PoolBuilder()
    records = torch.tensor([builder.add(adapter) for adapter in adapters], dtype=torch.int64)
    return builder.pool(), records.view(-1, RECORD_FIELDS)


def int4_block(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows rounded to four bits as a block of bytes, and a float scale for each row. Scales of groups differ widely."""
    rows, columns = values.shape
    grouped = torch.nn.functional.pad(values, (0, -columns % INT4_GROUP)).view(rows, -1, INT4_GROUP)
    grouped = grouped * torch.rand(rows, grouped.shape[1], 1).add(0.2)
    row_scale = grouped.abs().amax(dim=(1, 2)).clamp(min=1e-9) / 7 / 255
    scales = (grouped.abs().amax(dim=2) / 7 / row_scale[:, None]).round().clamp(min=1)
    steps = (grouped / (scales * row_scale[:, None])[:, :, None]).round().clamp(-7, 7)
    numbers = reference.int4_numbers(steps.flatten(1)[:, :columns])
    return torch.cat([numbers.flatten(), scales.to(torch.uint8).flatten()]), row_scale


def lowrank_adapter(
    rank: int,
    inner: int,
    outer: int,
    dtype: torch.dtype | str,
    *,
    bias: bool = False,
    embedding: bool = False,
    core: bool = False,
) -> Adapter:
    """Zero-mean factors, so that a wrong adapter cannot hide in the tolerance; deltas of about unit size."""
    offset = torch.randn(outer) if bias else None
    if rank == 0:
        return Adapter(bias=offset, dtype=dtype)
    a = torch.randn(inner, rank) if embedding else torch.randn(rank, inner) / inner**0.5
    b, d = torch.randn(rank, outer) / rank**0.5, torch.randn(rank)
    middle = torch.randn(rank, rank) / rank**0.5 if core else None
    if isinstance(dtype, str):
        (a, scale_a), (b, scale_b) = int4_block(a), int4_block(b)
        # The scales of b belong behind the core.
        d, after = (d * scale_a, scale_b) if core else (d * scale_a * scale_b, None)
        middle = middle * after if middle is not None and after is not None else middle
        return Adapter(a=a, b=b, d=d, bias=offset, core=middle, dtype=dtype)
    if dtype is torch.int8:
        rank_axis = 1 if embedding else 0
        scale_a, scale_b = (f.abs().amax(1 - axis, keepdim=True) / 127 for f, axis in ((a, rank_axis), (b, 0)))
        a, b, d = (a / scale_a).round(), (b / scale_b).round(), d * scale_a.flatten() * scale_b.flatten()
    return Adapter(a=a.to(dtype), b=b.to(dtype), d=d, bias=offset, core=middle, dtype=dtype)


def replacement(inner: int, outer: int, dtype: torch.dtype, *, bias: bool = False) -> Adapter:
    weight = (torch.randn(outer, inner) / inner**0.5).to(dtype)
    return Adapter(weight=weight, weight_bias=torch.randn(outer) if bias else None, dtype=dtype)


class Group(NamedTuple):
    """Rows that take one adapter, each with its weight (1 if none are given)."""

    slot: int
    rows: Sequence[int]
    weights: Sequence[float] = ()

    def weighted(self) -> list[tuple[int, float]]:
        return list(zip(self.rows, self.weights or [1.0] * len(self.rows), strict=True))


def segments_of(*groups: Group) -> Segments:
    rows = [row for group in groups for row in group.weighted()]
    lengths = [0, *(len(group.rows) for group in groups)]
    return Segments(
        slot=torch.tensor([group.slot for group in groups], dtype=torch.int32),
        start=torch.tensor(lengths).cumsum(0).to(torch.int32),
        token=torch.tensor([row for row, _ in rows], dtype=torch.int32),
        weight=torch.tensor([weight for _, weight in rows], dtype=torch.float32),
    )


def row_alone(groups: Sequence[Group], row: int) -> Segments:
    """A step of this row by itself, under all that it takes in the step of these groups, in their order."""
    found = [(group.slot, weight) for group in groups for other, weight in group.weighted() if other == row]
    return segments_of(*(Group(slot, [0], [weight]) for slot, weight in found))


def by_threads(call: Callable[[], Result]) -> list[Result]:
    """What a call gives with 1, 2 and 3 threads; the fixture `threads` puts their number back."""
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(call())
    return results


def swapped(segments: Segments, first: int = 0, second: int = 1) -> Segments:
    """The same step with two adapters exchanged: the mutation every comparison must notice."""
    slot = segments.slot.clone()
    slot[segments.slot == first] = second
    slot[segments.slot == second] = first
    return Segments(slot=slot, start=segments.start, token=segments.token, weight=segments.weight)


# One unit in the last place of the result: both sides round a nearly equal float32 once.
RTOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> bool:
    """The one comparison of the kernel tests: type, shape, and every element within the tolerance."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.allclose(actual.double(), expected.double(), rtol=RTOL[actual.dtype], atol=atol)


AttentionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Paged:
    """Requests with keys and values in pages, as the engine lays them out, and the same keys dense."""

    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    query_start: torch.Tensor
    kv_length: torch.Tensor
    block_table: torch.Tensor
    scale: float
    keys: list[torch.Tensor]  # per request [length, kv_heads, dim]
    values: list[torch.Tensor]

    def arguments(self) -> AttentionInputs:
        return (self.query, self.key_pool, self.value_pool, self.query_start, self.kv_length, self.block_table)

    def only(self, request: int, first: int = 0, last: int | None = None) -> AttentionInputs:
        """Arguments for queries `first` to `last` of one request alone, as an earlier or smaller step sends them."""
        begin, end = self.query_start[request : request + 2].tolist()
        last = end - begin if last is None else last
        length = self.kv_length[request : request + 1] - (end - begin - last)
        start = torch.tensor([0, last - first], dtype=torch.int32)
        query = self.query[begin + first : begin + last]
        return (query, self.key_pool, self.value_pool, start, length, self.block_table[request : request + 1])


def paged(
    lengths: Sequence[int],
    queries: Sequence[int],
    *,
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype = torch.float32,
) -> Paged:
    """Pools are strided views of one buffer of pages [K and V of 3 layers]; all that is not written is NaN."""
    counts = [-(-length // page_size) for length in lengths]
    buffer = torch.full((sum(counts) + 2, 2, 3, page_size, kv_heads, dim), torch.nan, dtype=pool_dtype)
    key_pool, value_pool = buffer[:, 0, 1], buffer[:, 1, 1]
    free = torch.randperm(len(buffer)).tolist()
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
        table[request, :count] = pages
        position = torch.arange(length)
        for pool, dense in ((key_pool, keys), (value_pool, values)):
            dense.append(torch.randn(length, kv_heads, dim).to(pool_dtype))
            pool[pages[position // page_size], position % page_size] = dense[-1]
    return Paged(
        query=torch.randn(sum(queries), heads, dim).to(dtype),
        key_pool=key_pool,
        value_pool=value_pool,
        query_start=torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        kv_length=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        scale=dim**-0.5,
        keys=keys,
        values=values,
    )
