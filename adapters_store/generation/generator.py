"""A trained generator: the model, the layout of what it makes, and the tasks that it has seen."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters_store.generation.icm import Cvae, IcmSettings
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Task:
    """condition: float32 [condition], the mean of its samples'; statistics: of its last sample; latent: float32
    [latent], the encoder's mean of its samples, which reconstructs them."""

    condition: torch.Tensor
    statistics: Statistics
    latent: torch.Tensor


@dataclass(frozen=True, slots=True)
class Generator:
    """base: fingerprint of the base; model: in evaluation mode, float32; digest: SHA-256 of its file, or "" before it
    has one. Tensors are not to be changed."""

    base: str
    layout: Layout
    model: Cvae
    tasks: Mapping[str, Task]
    digest: str = ""

    @property
    def settings(self) -> IcmSettings:
        return self.model.settings

    @property
    def condition(self) -> int:
        """Numbers of a condition."""
        return self.model.condition

    @property
    def latent(self) -> int:
        """Numbers of a latent."""
        return self.model.latent

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())
