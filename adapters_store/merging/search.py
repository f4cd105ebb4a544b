"""Weights for a merge by trial, without gradients, as LoRAHub (arXiv 2307.13269) finds them on a few examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters_store.forms import Form, ModuleSpec
from adapters_store.merging.methods import merge
from adapters_store.merging.parts import Source

Loss = Callable[[Mapping[str, tuple[Form, ...]]], float]
BOUND = 1.5  # of a weight, as in LoRAHub
REGULARISATION = 0.05  # times the sum of the weights' magnitudes, as in LoRAHub
FIRST_STEP = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """weights: in the order of the sources; loss: of the merged adapter, without regularisation; modules: its forms."""

    weights: tuple[float, ...]
    loss: float
    modules: Mapping[str, tuple[Form, ...]]


def weight_search(
    sources: Sequence[Source],
    loss: Loss,
    specs: Mapping[str, ModuleSpec],
    *,
    method: str = "linear",
    given: Mapping[str, Any] | None = None,
    iterations: int = 40,
    seed: int = 0,
) -> Found:
    """The weights, -1.5 to 1.5, whose merge has the least loss found in `iterations` merges, the first of all zeros.

    loss: of merged modules on a few labelled examples, any unit, lower is better; the sources' own weights are not
    looked at. A (1+1) evolution strategy with the one-fifth rule stands for LoRAHub's NGOpt: with so few dimensions and
    trials it needs no more. The same seed and loss give the same weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def tried(weights: torch.Tensor) -> tuple[float, Found]:
        each = tuple(weights.tolist())
        weighted = [replace(source, weight=weight) for source, weight in zip(sources, each, strict=True)]
        modules = merge(weighted, method, given or {}, specs).modules
        value = loss(modules)
        return value + REGULARISATION * float(weights.abs().sum()), Found(each, value, modules)

    at = torch.zeros(len(sources), dtype=torch.float64)
    least, best = tried(at)
    step = FIRST_STEP
    for _ in range(iterations - 1):
        away = torch.randn(len(sources), generator=generator, dtype=torch.float64)
        there = (at + step * away).clamp(-BOUND, BOUND)
        value, found = tried(there)
        if value < least:
            at, least, best = there, value, found
            step *= 1.5
        else:
            step *= 1.5**-0.25  # one success in five trials keeps the step
    return best
