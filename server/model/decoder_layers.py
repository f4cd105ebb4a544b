"""The decoder layers of a base model, and what the last of them gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from server.model.base import BaseModel


def decoder_layers(base: BaseModel) -> list[nn.Module]:
    """The list of modules that each hold one layer's attention; empty if there is none."""
    for module in base.model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != base.num_layers:
            continue
        if all(any(hasattr(part, "layer_idx") for part in layer.modules()) for layer in module):
            return list(module)
    return []


@contextmanager
def watch_last(base: BaseModel) -> Iterator[list[torch.Tensor]]:
    """What the last decoder layer gives in each forward pass of the context: [T, hidden size], before the final norm.

    Compiled layers are seen as well. Raises RuntimeError where the model has no list of layers.
    """
    layers = decoder_layers(base)
    if not layers:
        raise RuntimeError("the model has no list of decoder layers")
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    hook = layers[-1].register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
