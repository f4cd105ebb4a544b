"""Random adapters of every form for a tiny model; what they mean is computed by `tests.support.dense_forms`."""

from collections.abc import Callable

import torch

from adapters_store.forms import (
    BaseSpec,
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

Modules = dict[str, tuple[Form, ...]]
KINDS = ["sparse", "dense", "signs", "transform", "ia3", "scale", "gated", "several", "head", "embedding", "norm"]


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


def forms(kind: str, spec: BaseSpec) -> Modules:
    """An adapter of this kind; `head`, `embedding` and `norm` are places of several forms."""
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
