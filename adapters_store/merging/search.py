"""Weights for a merge by trial, without gradients, as LoRAHub (arXiv 2307.13269) finds them on a few examples."""

from dataclasses import dataclass

import torch

BOUND = 1.5  # of a weight, as in LoRAHub
REGULARISATION = 0.05  # times the sum of the weights' magnitudes, as in LoRAHub
FIRST_STEP = 0.5
ONE_FIFTH = 1.5**-0.25  # one success in five trials keeps the step


@dataclass(frozen=True, slots=True)
class Found:
    """weights: one for each source, -1.5 to 1.5; loss: of the adapter merged with them, without regularisation."""

    weights: tuple[float, ...]
    loss: float


class WeightSearch:
    """A (1+1) evolution strategy with the one-fifth rule: `ask` for weights, `tell` the loss of the sum they make.

    It stands for LoRAHub's NGOpt: with so few dimensions and trials it needs no more. The first weights are all zeros.
    The same seed and the same losses give the same weights.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        """count: of sources."""
        self._generator = torch.Generator().manual_seed(seed)
        self._at = torch.zeros(count, dtype=torch.float64)
        self._asked = self._at
        self._step = FIRST_STEP
        self._least = float("inf")
        self._best: Found | None = None

    @property
    def best(self) -> Found:
        """What had the least loss, regularised, so far. Raises ValueError before the first `tell`."""
        if self._best is None:
            raise ValueError("nothing has been tried yet")
        return self._best

    def ask(self) -> tuple[float, ...]:
        """The weights to try next; to be answered by `tell` before it is called again."""
        if self._best is not None:
            away = torch.randn(len(self._at), generator=self._generator, dtype=torch.float64)
            self._asked = (self._at + self._step * away).clamp(-BOUND, BOUND)
        return tuple(self._asked.tolist())

    def tell(self, loss: float) -> None:
        """loss: of what `ask` gave, lower is better, any unit; infinite or NaN for what cannot be used at all."""
        value = loss + REGULARISATION * float(self._asked.abs().sum())
        first = self._best is None
        if first or value < self._least:
            self._at, self._least = self._asked, value if value == value else float("inf")
            self._best = Found(tuple(self._asked.tolist()), loss)
            self._step *= 1.0 if first else 1.5
        else:
            self._step *= ONE_FIFTH
