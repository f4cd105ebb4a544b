"""Random forms packed into a pool as the engine packs them, and what each means as a dense matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.segments import FACTOR_DTYPES, FORM_FIELDS, ONE_BIT, FormField, Segments
from tests.kernels.support import PoolBuilder


@dataclass(frozen=True)
class Forms:
    """One adapter's forms for one module; None: it has none of that kind."""

    sparse: torch.Tensor | None = None  # dense float32 [rows, columns], mostly zeros
    dense: torch.Tensor | None = None  # [out, in] of a factor type; bool: signs
    dense_scale: torch.Tensor | None = None  # [out]
    blocks: torch.Tensor | None = None  # [in / size, size, size]
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    pair: torch.Tensor | None = None
    stride: int = 0

    def record(self, builder: PoolBuilder) -> list[int]:
        """The module's form record; its blocks go into the pool."""
        record = [0] * FORM_FIELDS
        if self.sparse is not None:
            rows = self.sparse != 0
            start = torch.cat([torch.zeros(1), rows.sum(dim=1).cumsum(0)]).int()
            record[FormField.SPARSE_START] = builder.put(start)
            record[FormField.SPARSE_COLUMN] = builder.put(rows.nonzero()[:, 1].int())
            record[FormField.SPARSE_VALUE] = builder.put(self.sparse[rows])
            record[FormField.SPARSE_ROWS], record[FormField.SPARSE_COUNT] = len(rows), int(rows.sum())
        if self.dense is not None:
            signs = self.dense.dtype == torch.bool
            record[FormField.DENSE] = builder.put(sign_bits(self.dense) if signs else self.dense)
            record[FormField.DENSE_SCALE] = builder.put(self.dense_scale)
            record[FormField.DENSE_DTYPE] = ONE_BIT if signs else FACTOR_DTYPES.index(self.dense.dtype)
            record[FormField.DENSE_ROWS] = len(self.dense)
        if self.blocks is not None:
            record[FormField.TRANSFORM] = builder.put(self.blocks.mT)
            record[FormField.TRANSFORM_SIZE] = self.blocks.shape[-1]
        if self.stride:
            record[FormField.SCALE], record[FormField.SCALE_BIAS] = builder.put(self.scale), builder.put(self.bias)
            record[FormField.SCALE_PAIR], record[FormField.SCALE_STRIDE] = builder.put(self.pair), self.stride
        return record

    def delta(self) -> torch.Tensor:
        """Sparse and dense deltas as one float64 matrix [out, in]."""
        found = [] if self.sparse is None else [self.sparse.double()]
        if self.dense is not None and self.dense_scale is not None:
            numbers = self.dense.double() * 2 - 1 if self.dense.dtype == torch.bool else self.dense.double()
            found.append(numbers * self.dense_scale.double()[:, None])
        return torch.stack(found).sum(dim=0)

    def rotation(self) -> torch.Tensor:
        """R as a float64 matrix [in, in]."""
        assert self.blocks is not None
        count, size, _ = self.blocks.shape
        whole = torch.zeros(count * size, count * size, dtype=torch.float64)
        for number, block in enumerate(self.blocks):
            whole[number * size :, number * size :][:size, :size] = block
        return whole

    def scaling(self, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """M [out, out] and c [out], float64, of `M y + c`."""
        matrix = torch.diag(torch.ones(outputs) if self.scale is None else self.scale).double()
        if self.pair is not None:
            for i in range(outputs):
                other = i + self.stride if i % (2 * self.stride) < self.stride else i - self.stride
                matrix[i, other] += self.pair[i].double()
        return matrix, torch.zeros(outputs).double() if self.bias is None else self.bias.double()


def sign_bits(signs: torch.Tensor) -> torch.Tensor:
    """bool [rows, columns] as uint8 [rows, ceil(columns / 8)], the lowest bit first; what fills up a row is set."""
    filled = torch.nn.functional.pad(signs.to(torch.uint8), (0, -signs.shape[1] % 8), value=1).view(len(signs), -1, 8)
    return (filled << torch.arange(8, dtype=torch.uint8)).sum(dim=2).to(torch.uint8)


def pack(adapters: Sequence[Forms]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool and forms [slots, FORM_FIELDS]; slot i is adapter i."""
    builder = PoolBuilder()
    records = torch.tensor([adapter.record(builder) for adapter in adapters], dtype=torch.int64)
    return builder.pool(), records.view(-1, FORM_FIELDS)


def sparse(rows: int, columns: int, share: float = 0.2) -> Forms:
    """About that share of the numbers, rows of unlike lengths, some of them empty; never the last number."""
    chosen = torch.rand(rows, columns) < torch.rand(rows, 1) ** 2 * 2 * share
    chosen[-1, -1] = True
    return Forms(sparse=torch.randn(rows, columns) * chosen / (columns * share) ** 0.5)


def dense(outputs: int, inputs: int, dtype: torch.dtype) -> Forms:
    """dtype: of FACTOR_DTYPES, or torch.bool for signs."""
    numbers = torch.randn(outputs, inputs)
    scale = torch.randn(outputs) / inputs**0.5
    if dtype == torch.bool:
        return Forms(dense=numbers > 0, dense_scale=scale)
    if dtype == torch.int8:
        return Forms(dense=(numbers * 40).round().clamp(-127, 127).to(dtype), dense_scale=scale / 40)
    return Forms(dense=numbers.to(dtype), dense_scale=scale)


def transform(inputs: int, size: int) -> Forms:
    return Forms(blocks=torch.randn(inputs // size, size, size) / size**0.5)


def output_scale(outputs: int, stride: int = 1, *, only: str = "") -> Forms:
    """Scale, bias and, where the stride allows it, pair; `only`: one of them."""
    whole = Forms(scale=torch.randn(outputs) + 1, bias=torch.randn(outputs), stride=stride)
    if outputs % (2 * stride) == 0:
        whole = replace(whole, pair=torch.randn(outputs))
    return Forms(**{only: getattr(whole, only)}, stride=stride) if only else whole


def per_row(segments: Segments) -> dict[int, list[tuple[int, float]]]:
    """The adapters of each row, and their weights."""
    found: dict[int, list[tuple[int, float]]] = {}
    starts = segments.start.tolist()
    for slot, first, last in zip(segments.slot.tolist(), starts[:-1], starts[1:], strict=True):
        for token, weight in zip(
            segments.token[first:last].tolist(), segments.weight[first:last].tolist(), strict=True
        ):
            found.setdefault(token, []).append((slot, weight))
    return found
