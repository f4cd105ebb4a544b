"""Adapters of two tasks for the small base, and generators that know them."""

from collections.abc import Mapping
from functools import cache

import torch

from adapters_store.forms import LowRank
from adapters_store.generation.icm import IcmSettings
from adapters_store.generation.training import Sample, Trained, TrainSettings, train
from tests.adapters_store.support import BASE, MODULES

TARGETS = ("q_proj", "v_proj")
NEAR = 0.02  # spread of a task's samples around it
NOT_PINNED = 0.7  # most distance from a task of what is made for it with a z that is drawn
TINY = IcmSettings(latent=8, channels=(8, 16, 8))
CONDITIONS = {"left": torch.tensor([1.0, 2.0, 3.0, 4.0]), "right": torch.tensor([-2.0, 2.0, 0.5, 4.0])}


def adapter(seed: int, rank: int = 2, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> dict[str, LowRank]:
    """Zero-mean random factors for every module of the small base that ends in one of `TARGETS`."""
    drawn = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in MODULES.items():
        if name.endswith(TARGETS):
            a = torch.randn(rank, spec.in_features, generator=drawn)
            b = torch.randn(spec.out_features, rank, generator=drawn)
            made[name] = LowRank(a.to(dtype), b.to(dtype), torch.full((rank,), scale))
    return made


def near(modules: Mapping[str, LowRank], seed: int) -> dict[str, LowRank]:
    drawn = torch.Generator().manual_seed(seed)
    made = {}
    for name, form in modules.items():
        a, b = (part + NEAR * torch.randn(part.shape, generator=drawn) for part in (form.a, form.b))
        made[name] = LowRank(a, b, form.d)
    return made


TASKS = {"left": adapter(1), "right": adapter(2)}


def samples() -> list[Sample]:
    return [
        Sample(near(modules, 10 * number + index), CONDITIONS[task], task)
        for number, (task, modules) in enumerate(TASKS.items())
        for index in range(4)
    ]


def distance(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Relative Frobenius distance of all deltas together."""
    deltas = [
        (x.b.double() @ torch.diag(x.d.double()) @ x.a.double(), y.b.double() @ torch.diag(y.d.double()) @ y.a.double())
        for x, y in ((one[name], other[name]) for name in one)
    ]
    lost = sum(float((x - y).square().sum()) for x, y in deltas)
    return float((lost / sum(float(y.square().sum()) for _, y in deltas)) ** 0.5)


@cache
def trained() -> Trained:
    """A generator of both tasks, trained for about a second."""
    return train(samples(), TrainSettings(BASE.fingerprint, TINY, epochs=250, rate=5e-3))
