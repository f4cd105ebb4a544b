"""Small steps of a model's twin, with and without adapters, for tracing its layers and for checking what came of it."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from kernels.segments import Field, Segments
from server.model.base import BaseModel
from server.model.compiled import adapter_linears
from server.model.errors import CompileError
from server.model.kv_cache import KVCache
from server.model.prepare import forward
from server.model.quantize import Int8Linear
from server.model.step_context import AdapterTable, AttentionMetadata, StepContext

_RANK = 3
_PAGES = 4  # of each request
# Largest norm of the difference over the norm of what a layer adds, compiled against not, for the same input. In int8
# a few activations may round to the neighbouring step, in bf16 every one may.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """New tokens of each request, and the tokens it had before."""

    counts: tuple[int, ...]
    past: tuple[int, ...]


SHORT = Shape((5,), (0,))
LONG = Shape((5, 2, 1), (0, 5, 7))  # no two sizes that are open in a graph may be 1, or be equal by design
SHAPES = (SHORT, LONG, Shape((1,), (5,)), Shape((1, 1), (8, 6)))


class Probe:
    """Runs steps of random tokens on a twin that nobody else uses; `live`: the context it will be swapped for."""

    def __init__(self, twin: BaseModel, context: StepContext, live: StepContext) -> None:
        assert live.cache is not None
        self._base = twin
        self.context = context
        requests = max(len(shape.counts) for shape in SHAPES)
        shape = (twin.num_layers, twin.num_kv_heads, twin.head_dim)
        context.cache = KVCache(
            requests * _PAGES,
            *shape,
            dtype=live.cache.buffer.dtype,
            device=twin.device,
            page_size=live.cache.page_size,
        )
        context.table = AdapterTable(context.module_names, 2, twin.device)
        self._add_adapters()

    def begin(self, shape: Shape, *, with_adapters: bool) -> None:
        """Set the step; with adapters request i takes the one in slot i % 2."""
        assert self.context.cache is not None
        device, page = self._base.device, self.context.cache.page_size
        starts = [0, *accumulate(shape.counts)]
        table = [
            [len(shape.counts) * number + request for number in range(_PAGES)] for request in range(len(shape.counts))
        ]
        places = [
            table[request][position // page] * page + position % page
            for request, (count, past) in enumerate(zip(shape.counts, shape.past, strict=True))
            for position in range(past, past + count)
        ]
        lengths = [count + past for count, past in zip(shape.counts, shape.past, strict=True)]
        self.context.begin(
            AttentionMetadata(
                query_start=torch.tensor(starts, dtype=torch.int32, device=device),
                kv_length=torch.tensor(lengths, dtype=torch.int32, device=device),
                block_table=torch.tensor(table, dtype=torch.int32, device=device),
                slots=torch.tensor(places, device=device),
            ),
            self._segments(starts) if with_adapters else None,
            None,
            (0, 1) if with_adapters else (),
        )

    def logits(self, shape: Shape, *, with_adapters: bool) -> torch.Tensor:
        """Logits of every row of a step."""
        self.begin(shape, with_adapters=with_adapters)
        count = sum(shape.counts)
        rows = torch.arange(count, device=self._base.device)
        positions = [p for n, past in zip(shape.counts, shape.past, strict=True) for p in range(past, past + n)]
        tokens = (rows * 37 + 11) % self._base.vocabulary
        return forward(self._base, self.context, tokens, torch.tensor(positions, device=rows.device), rows)

    def run_all(self) -> None:
        """Steps of all shapes, without adapters and with, from an empty cache."""
        assert self.context.cache is not None
        self.context.cache.buffer.zero_()
        for with_adapters in (False, True):
            for shape in SHAPES:
                self.logits(shape, with_adapters=with_adapters)

    def _segments(self, starts: list[int]) -> Segments:
        """Every row under one adapter, and the last under both: a row's second adapter is code of its own."""
        device = self._base.device
        slots: list[list[int]] = [[], []]
        for request, (first, last) in enumerate(pairwise(starts)):
            slots[request % 2] += range(first, last)
        slots[1] = sorted({*slots[1], starts[-1] - 1})
        tokens = slots[0] + slots[1]
        return Segments(
            slot=torch.tensor([0, 1], dtype=torch.int32, device=device),
            start=torch.tensor([0, len(slots[0]), len(tokens)], dtype=torch.int32, device=device),
            token=torch.tensor(tokens, dtype=torch.int32, device=device),
            weight=torch.full((len(tokens),), 0.5, device=device),
        )

    def _add_adapters(self) -> None:
        """Two adapters on every linear; all read the same random factors, large enough to be seen in the logits."""
        assert self.context.table is not None
        linears = [module for module in adapter_linears(self._base.model) if not module.head]
        sizes = [self._base.spec.modules[self.context.module_names[module.index]] for module in linears]
        longest = max(max(size.in_features, size.out_features) for size in sizes)
        source = torch.Generator().manual_seed(1)
        factors = torch.randn(_RANK * longest, generator=source) / longest**0.5
        scales = torch.ones(16)
        self.context.pool = torch.cat([factors, scales]).view(torch.uint8).to(self._base.device)
        record = {Field.A: 0, Field.B: 0, Field.D: factors.nbytes, Field.RANK: _RANK, Field.DTYPE: 0}
        for slot in (0, 1):
            for module in linears:
                self.context.table.set(slot, module.index, [record.get(column, -1) for column in Field])


def check_compiled(base: BaseModel, before: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Raise CompileError unless a compiled layer makes of the rows `before` what the layer itself makes of them.

    Layer by layer, because in a whole model of int8 products the smallest difference grows to a tenth of the logits.
    """
    quantized = any(isinstance(module, Int8Linear) for module in base.model.modules())
    limit = _LOW_PRECISION_TOLERANCE if quantized else _TOLERANCE.get(base.dtype, _LOW_PRECISION_TOLERANCE)
    difference = float((found.float() - expected.float()).norm() / (expected.float() - before.float()).norm())
    if not difference <= limit:  # NaN fails too
        raise CompileError(f"a compiled layer gives other numbers (relative difference {difference:.2g})")
