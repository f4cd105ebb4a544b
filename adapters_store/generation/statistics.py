"""Normalisation of an adapter's vector: each tensor to mean 0 and standard deviation 1 (ICM-LoRA, released code)."""

from dataclasses import dataclass

import torch

from adapters_store.generation.layout import Layout


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of each tensor of a layout, in its order. mean, std: float32 [tensors]; a tensor of equal numbers has std 0."""

    mean: torch.Tensor
    std: torch.Tensor


def measure(vector: torch.Tensor, layout: Layout) -> Statistics:
    """vector: [numbers]."""
    parts = [part.double() for part in torch.split(vector, layout.counts())]
    mean = torch.stack([part.mean() for part in parts])
    std = torch.stack([part.std(correction=0) for part in parts])
    return Statistics(mean.float(), std.float())


def normalise(vector: torch.Tensor, statistics: Statistics, layout: Layout) -> torch.Tensor:
    """[numbers], of the vector's type."""
    mean, std = _spread(statistics, layout, vector.dtype)
    return (vector - mean) / torch.where(std > 0, std, torch.ones_like(std))


def restore(vector: torch.Tensor, statistics: Statistics, layout: Layout) -> torch.Tensor:
    """`normalise` undone, up to rounding."""
    mean, std = _spread(statistics, layout, vector.dtype)
    return vector * std + mean


def _spread(statistics: Statistics, layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor(layout.counts())
    return statistics.mean.to(dtype).repeat_interleave(counts), statistics.std.to(dtype).repeat_interleave(counts)
