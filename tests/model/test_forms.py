"""Every form on every kind of module, mixed in a batch, against a model whose modules compute it densely."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adapters_store.forms import (
    AdapterWeights,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    LowRank,
    OutputScale,
    ReplacedWeight,
    SignRows,
    Sparse,
)
from kernels.reference import lora_gate
from kernels.segments import GATE_FIELDS, GateField
from server.engine.adapter_pool import Placement
from server.engine.adapter_storage import AdapterStorage
from server.engine.packing import pack
from server.model.base import BaseModel
from server.model.step_context import AdapterTable, StepContext
from tests.model.paged import difference, plain_logits, prepared, random_requests, run
from tests.support.models import VOCABULARY, tiny_model

Modules = dict[str, tuple[Form, ...]]
KINDS = ["sparse", "dense", "signs", "transform", "ia3", "scale", "gated", "several", "head", "embedding", "norm"]
LENGTHS = [17, 9, 12, 6]
PAGE = 1 << 14


def sparse(rows: int, columns: int) -> Sparse:
    numbers = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.1)
    found = numbers != 0
    start = torch.cat([torch.zeros(1), found.sum(dim=1).cumsum(0)]).int()
    return Sparse(start, found.nonzero()[:, 1].int(), numbers[found])


def lowrank(inputs: int, outputs: int) -> LowRank:
    return LowRank(torch.randn(4, inputs) / 8, torch.randn(outputs, 4) / 2, torch.randn(4), torch.randn(outputs) / 4)


def gated(inputs: int, outputs: int) -> GatedLowRank:
    part = lowrank(inputs, outputs)
    return GatedLowRank(part.a, part.b, part.d, torch.randn(2, inputs) / 4, torch.rand(4), 3, part.bias)


def dense(inputs: int, outputs: int) -> Dense:
    return Dense(torch.randn(outputs, inputs), torch.randn(outputs) / 10)


def signs(inputs: int, outputs: int) -> Dense:
    bits = torch.randint(0, 256, (outputs, -(-inputs // 8)), dtype=torch.uint8)
    return Dense(SignRows(bits, inputs), torch.randn(outputs) / 10)


def scale(outputs: int, *, pair: bool = True) -> OutputScale:
    partner = torch.randn(outputs) / 4 if pair and outputs % 8 == 0 else None
    return OutputScale(1 + torch.randn(outputs) / 4, torch.randn(outputs) / 4, partner, 4)


def transform(inputs: int, size: int) -> InputTransform:
    return InputTransform(torch.eye(size) + torch.randn(inputs // size, size, size) / 4)


def forms(kind: str, base: BaseModel) -> Modules:
    """An adapter of this kind; `head`, `embedding` and `norm` are places of several forms."""
    spec = base.spec
    linears = {name: s for name, s in spec.modules.items() if s.kind != "embedding" and name != spec.head}
    sizes = {name: (s.in_features, s.out_features) for name, s in linears.items()}
    makers: dict[str, Callable[[int, int], tuple[Form, ...]]] = {
        "sparse": lambda i, o: (sparse(o, i),),
        "dense": lambda i, o: (dense(i, o),),
        "signs": lambda i, o: (signs(i, o),),
        "transform": lambda i, o: (transform(i, 8),),
        "ia3": lambda i, o: (transform(i, 1),),
        "scale": lambda i, o: (scale(o),),
        "gated": lambda i, o: (gated(i, o),),
        "several": lambda i, o: (transform(i, 4), lowrank(i, o), sparse(o, i), signs(i, o), scale(o)),
    }
    if kind in makers:
        return {name: makers[kind](*size) for name, size in sizes.items()}
    if kind == "norm":
        return {name: (scale(size),) for name, size in spec.norms.items()}
    if kind == "embedding":
        tables = {name: spec.modules[name] for name in spec.embeddings}
        return {
            name: (sparse(s.in_features, s.out_features), scale(s.out_features, pair=False))
            for name, s in tables.items()
        }
    assert spec.head is not None
    module = spec.modules[spec.head]
    inputs, outputs = module.in_features, module.out_features
    replaced = ReplacedWeight(torch.randn(outputs, inputs) / 4, torch.randn(outputs))
    return {
        spec.head: (replaced, transform(inputs, 2), lowrank(inputs, outputs), dense(inputs, outputs), scale(outputs))
    }


def place(base: BaseModel, context: StepContext, adapters: list[Modules]) -> None:
    """Adapter i lies in slot i, as the engine packs and stores it."""
    packed = [pack(AdapterWeights(str(i), m), base.spec.embeddings, PAGE) for i, m in enumerate(adapters)]
    context.pool = torch.full((sum(p.num_bytes for p in packed) + 64,), 0xFF, dtype=torch.uint8)
    context.table = AdapterTable(context.module_names, len(adapters))
    storage, start = AdapterStorage(context.pool, context.table), 64
    for slot, adapter in enumerate(packed):
        offsets = []
        for size in adapter.sizes:
            offsets.append(start)
            start += size
        storage.write(Placement(slot, tuple(offsets), ()), adapter)


class Changed(nn.Module):
    """A module of the oracle: what `adapters_store.forms` says, in dense matrices."""

    def __init__(self, base: nn.Module, found: tuple[Form, ...]) -> None:
        super().__init__()
        self.base = base
        self.found = {type(form): form for form in found}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(self.turned(x))
        for kind in (ReplacedWeight, LowRank, GatedLowRank, Sparse, Dense, OutputScale):
            if kind in self.found:
                y = self.applied(self.found[kind], x, y)
        return y

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        form = self.found.get(InputTransform)
        if not isinstance(form, InputTransform):
            return x
        return x @ torch.block_diag(*form.blocks).T  # type: ignore[no-untyped-call,no-any-return]

    def applied(self, form: Form, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        match form:
            case ReplacedWeight(weight, bias):
                return nn.functional.linear(x, weight, bias)
            case LowRank(a, b, d, bias):
                return y + ((x @ a.T) * d) @ b.T + (0 if bias is None else bias)
            case GatedLowRank(a, b, d, bias=bias):
                gate = gate_of(form, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
                return y + ((x @ a.T) * d * gate) @ b.T + (0 if bias is None else bias)
            case Sparse(start, column, value):
                matrix = torch.zeros(len(start) - 1, y.shape[-1] if x.dtype == torch.int64 else x.shape[-1])
                rows = torch.arange(len(matrix)).repeat_interleave(start.diff())
                matrix[rows, column.long()] = value
                return y + (matrix[x] if x.dtype == torch.int64 else x @ matrix.T)
            case Dense(weight, factor):
                return y + (x @ matrix_of(weight).T) * factor
            case OutputScale(factor, bias, pair, stride):
                made = y * (1 if factor is None else factor) + (0 if bias is None else bias)
                if pair is not None:
                    made = made + pair * y[..., torch.arange(y.shape[-1]).view(-1, 2, stride).flip(1).flatten()]
                return made
        raise AssertionError(form)


def matrix_of(weight: torch.Tensor | SignRows) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.float()
    rows = [
        [1.0 if row[j // 8] >> (j % 8) & 1 else -1.0 for j in range(weight.columns)] for row in weight.bits.tolist()
    ]
    return torch.tensor(rows)


def gate_of(form: GatedLowRank, x: torch.Tensor) -> torch.Tensor:
    """By `kernels.reference.lora_gate`, which has tests of its own."""
    assert form.router_bias is not None
    router, bias = form.router.float().flatten(), form.router_bias
    gate = [0] * GATE_FIELDS
    gate[GateField.BIAS], gate[GateField.ROWS] = router.nbytes, len(form.router)
    gate[GateField.RANK], gate[GateField.ACTIVE] = form.rank, form.active
    return lora_gate(x, torch.cat([router, bias]).view(torch.uint8), torch.tensor(gate))


def changed(architecture: str, modules: Modules) -> Any:
    model = tiny_model(architecture)
    for name, found in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Changed(model.get_submodule(name), found))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_mixed_rows_equal_dense_computation(architecture: str) -> None:
    base, context = prepared(architecture)
    torch.manual_seed(3)
    adapters = [forms(kind, base) for kind in KINDS]
    place(base, context, adapters)
    for first in range(0, len(KINDS), 3):
        slots = [*range(first, min(first + 3, len(KINDS))), None]
        requests = random_requests(LENGTHS[: len(slots)], VOCABULARY, seed=1, slots=slots)
        swapped = random_requests(LENGTHS[: len(slots)], VOCABULARY, seed=1, slots=[*slots[1:-1], slots[0], None])
        found, others = run(base, context, requests, seed=2), run(base, context, swapped, seed=2)
        for request, logits, other in zip(requests, found, others, strict=True):
            modules = {} if request.slot is None else adapters[request.slot]
            expected = plain_logits(changed(architecture, modules), request.tokens)
            kind = None if request.slot is None else KINDS[request.slot]
            assert difference(logits, expected) < 1e-4, kind
            assert torch.equal(logits.argmax(-1), expected.argmax(-1)), kind
            assert request.slot is None or difference(other, expected) > 0.01, kind


def test_norms_are_those_over_the_whole_width() -> None:
    base, _ = prepared("gemma3_text")
    names = set(base.spec.norms)
    assert {"model.norm", "model.layers.0.input_layernorm"} <= names
    assert not [name for name in names if "q_norm" in name or "k_norm" in name], "those see heads as rows"
    assert set(base.spec.norms.values()) == {64}
