"""Tiny generators for the tests' base, trained in some milliseconds."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from adapters_store.forms import LowRank
from adapters_store.generation import generator_file
from adapters_store.generation.icm import IcmSettings
from adapters_store.generation.training import Sample, Trained, TrainSettings, train
from tests.adapters_store.support import BASE, MODULES

SMALL = IcmSettings(latent=4, channels=(2, 3))
CONDITION = 5
TASKS = ("law", "verse")


def low_rank(seed: int, rank: int = 2) -> dict[str, LowRank]:
    """Zero-mean random factors for q_proj and v_proj of the base."""
    source = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in MODULES.items():
        if name.endswith(("q_proj", "v_proj")):
            a = torch.randn(rank, spec.in_features, generator=source)
            b = torch.randn(spec.out_features, rank, generator=source)
            made[name] = LowRank(a, b, torch.full((rank,), 2.0))
    return made


@cache
def trained(seed: int = 0, base: str = BASE.fingerprint, rank: int = 2) -> Trained:
    source = torch.Generator().manual_seed(100 + seed)
    conditions = {task: torch.randn(CONDITION, generator=source) for task in TASKS}
    samples = [
        Sample(low_rank(10 * number + each, rank), conditions[task], task)
        for number, task in enumerate(TASKS)
        for each in range(3)
    ]
    return train(samples, TrainSettings(base, SMALL, epochs=2, seed=seed))


def write_generator(folder: Path, seed: int = 0, base: str = BASE.fingerprint, rank: int = 2) -> Path:
    """A generator's file; of another seed it has other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"generator-{seed}"
    generator_file.save(trained(seed, base, rank).generator, path)
    return path


def losses(seed: int = 0) -> list[Mapping[str, float]]:
    return [asdict(loss) for loss in trained(seed).losses]
