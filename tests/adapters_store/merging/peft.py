"""PEFT's own `add_weighted_adapter` over a small model with linear, Conv1D and embedding modules: the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.forms import LowRank, ModuleSpec
from adapters_store.merging.parts import Source, Stack

SPECS = {
    "embed": ModuleSpec("embedding", 50, 24),
    "linear": ModuleSpec("linear", 24, 40),
    "conv": ModuleSpec("conv1d", 40, 24),
}
METHODS = ("_generalized_task_arithmetic_weighted_adapter", "_svd_generalized_task_arithmetic_weighted_adapter")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(50, 24), nn.Linear(24, 40), Conv1D(24, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(self.linear(self.embed(ids)))
        return found


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its weight in the merge and its config's options."""

    weight: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Oracle:
    """The model with the adapters; names: theirs, in order."""

    model: Any
    adapters: Sequence[Adapter]

    @property
    def names(self) -> list[str]:
        return [f"a{at}" for at in range(len(self.adapters))]

    def sources(self) -> list[Source]:
        """The same adapters as our importer has them."""
        found = []
        for name, adapter in zip(self.names, self.adapters, strict=True):
            modules = {
                key: (LowRank(*factors, torch.full((len(factors[0]),), layer.scaling[name])),)
                for key, layer in layers(self.model).items()
                if (factors := tensors(layer, name)) is not None
            }
            found.append(Source(modules, adapter.weight, adapter.options.get("use_rslora", False)))
        return found

    def merged(self, kind: str, seed: int = 0, **options: Any) -> dict[str, LowRank]:
        """What PEFT makes of them. Before each module PEFT's random numbers are set to those that ours has."""

        def seeded(method: str) -> Any:
            original = getattr(LoraModel, method)

            def run(model: Any, *arguments: Any, **told: Any) -> Any:
                target = next(each for each in arguments if isinstance(each, LoraLayer))
                (name,) = [key for key, layer in layers(self.model).items() if layer is target]
                torch.manual_seed(Stack(name, SPECS[name], ()).generator(seed).initial_seed())
                return original(model, *arguments, **told)

            return run

        with patch.multiple(LoraModel, **{method: seeded(method) for method in METHODS}):
            weights = [adapter.weight for adapter in self.adapters]
            self.model.base_model.add_weighted_adapter(self.names, weights, "merged", kind, **options)
        return {
            key: LowRank(*found, torch.full((len(found[0]),), layer.scaling["merged"]))
            for key, layer in layers(self.model).items()
            if (found := tensors(layer, "merged")) is not None
        }


def oracle(*adapters: Adapter) -> Oracle:
    """Zero-mean random factors, other ones for each adapter."""
    model = Small()
    made: Any = None
    for at, adapter in enumerate(adapters):
        config = LoraConfig(**{"target_modules": list(SPECS), **adapter.options})
        if made is None:
            made = get_peft_model(model, config, adapter_name="a0")
        else:
            made.add_adapter(f"a{at}", config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return Oracle(made, adapters)


def layers(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def tensors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if name in layer.lora_A:
        return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data
    return None
