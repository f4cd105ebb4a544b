"""Element-wise merges of tensors of one shape, one at a time in memory: TIES (arXiv 2306.01708), DARE (2311.03099).

The tensors are weighted already, so that a source's weight counts in the election of signs too.
"""

from collections.abc import Callable
from typing import Literal

import torch

Operator = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Majority = Literal["total", "frequency"]
Make = Callable[[int], torch.Tensor]  # the tensor of a source, made anew at each call
Chance = Callable[[int], torch.Generator]  # the random numbers of a source, the same at each call


def combine(
    operator: Operator, count: int, make: Make, density: float, majority: Majority, chance: Chance
) -> torch.Tensor:
    """The merge of `make(0)` to `make(count - 1)`; holds about five tensors of their size.

    linear: their sum. magnitude_prune: the sum of the largest `density` of each's entries. dare_linear: the sum of
    entries kept with the chance `density` and divided by it. ties, dare_ties: of the entries thus kept those of the
    elected sign, their mean. majority: a sign is elected by the sum of the values or by their number; a draw is +.
    """

    def kept(source: int) -> torch.Tensor:
        tensor = make(source)
        if operator == "linear":
            return tensor
        if operator in ("dare_linear", "dare_ties"):
            return dropped(tensor, density, chance(source))
        return trimmed(tensor, density)

    if operator in ("ties", "dare_ties"):
        return _elected(count, kept, majority)
    merged = kept(0)
    for source in range(1, count):
        merged = merged + kept(source)
    return merged


def trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The `int(density * numel)` entries of largest magnitude; as many more as are equal to the least of them."""
    count = int(density * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor)
    size = tensor.abs()
    least = size.flatten().kthvalue(tensor.numel() - count + 1).values
    return torch.where(size >= least, tensor, 0.0)


def dropped(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Entries kept with the chance `density`, divided by it, so that the expectation stays."""
    chances = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return torch.where(chances < density, tensor / density, 0.0)


def _elected(count: int, kept: Make, majority: Majority) -> torch.Tensor:
    votes = kept(0) if majority == "total" else kept(0).sign()
    for source in range(1, count):
        votes = votes + (kept(source) if majority == "total" else kept(source).sign())
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    merged, number = torch.zeros_like(votes), torch.zeros_like(votes)
    for source in range(count):
        tensor = kept(source)
        agrees = tensor.sign() == sign
        merged += torch.where(agrees, tensor, 0.0)
        number += agrees
    return merged / number.clamp(min=1)
