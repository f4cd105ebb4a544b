"""Adapters to merge, and what their merges mean as dense matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapters_store.forms import Form, LowRank, ModuleSpec
from adapters_store.merging.methods import merge
from adapters_store.merging.parts import Source
from tests.adapters_store.compression.support import delta, dense

SHAPES = {"wide": (24, 40), "tall": (36, 20), "square": (28, 28)}  # in, out
SPECS = {name: ModuleSpec("linear", *shape) for name, shape in SHAPES.items()}
RANKS = (3, 5, 4)
WEIGHTS = (1.0, 0.5, -0.75)
Modules = Mapping[str, tuple[Form, ...]]


def source(rank: int, seed: int, weight: float = 1.0, names: Sequence[str] = tuple(SHAPES)) -> Source:
    modules = {name: (delta(rank, *SHAPES[name], seed=seed * 10 + at),) for at, name in enumerate(names)}
    return Source(modules, weight)


def sources(ranks: Sequence[int] = RANKS, weights: Sequence[float] = WEIGHTS) -> list[Source]:
    return [source(rank, seed, weight) for seed, (rank, weight) in enumerate(zip(ranks, weights, strict=True))]


def matrices(modules: Modules) -> dict[str, torch.Tensor]:
    """dW of every module, float64."""
    found = {}
    for name, (form,) in modules.items():
        assert isinstance(form, LowRank)
        found[name] = dense(form)
    return found


def exact(given: Sequence[Source]) -> dict[str, torch.Tensor]:
    """`sum_i w_i dW_i` of every module."""
    found: dict[str, torch.Tensor] = {}
    for each in given:
        for name, matrix in matrices(each.modules).items():
            found[name] = found.get(name, torch.zeros_like(matrix)) + each.weight * matrix
    return found


def merged(given: Sequence[Source], method: str, **parameters: Any) -> dict[str, torch.Tensor]:
    return matrices(merge(given, method, parameters, SPECS).modules)


def close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    assert one.keys() == other.keys()
    return all(
        bool(torch.linalg.matrix_norm(one[name] - other[name]) <= tolerance * torch.linalg.matrix_norm(other[name]))
        for name in one
    )
