"""Which modules of the base model an adapter may target."""

from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.forms import BaseSpec, ModuleSpec


def adapter_kind(module: nn.Module) -> Literal["linear", "conv1d", "embedding"] | None:
    """How an adapter acts on this module; None: it cannot.

    A subclass with a forward of its own is left out (OPT's position table takes a mask, not ids), except an embedding
    that scales its result by `embed_scale` (Gemma), which PEFT knows too.
    """
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return "conv1d"
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or _scales(module)):
        return "embedding"
    return None


def module_spec(module: nn.Module) -> ModuleSpec | None:
    """Shape of a target module, or None when it is none. Conv1D (GPT-2) stores its weight as [in, out]."""
    match adapter_kind(module):
        case None:
            return None
        case "embedding":
            return ModuleSpec("embedding", *_shape(module), scale=float(getattr(module, "embed_scale", 1.0)))
        case "conv1d":
            return ModuleSpec("conv1d", *_shape(module), bias=True)
        case "linear":
            outputs, inputs = _shape(module)
            return ModuleSpec("linear", inputs, outputs, bias=module.bias is not None)


def base_spec(model: nn.Module, identity: str, fingerprint: str, aliases: tuple[str, ...] = ()) -> BaseSpec:
    """Every target module by its full dotted name, before `prepare_model` wraps them."""
    modules = {name: spec for name, module in model.named_modules() if (spec := module_spec(module)) is not None}
    head_module = _embeddings(model, "get_output_embeddings")
    input_module = _embeddings(model, "get_input_embeddings")
    head = next((name for name, module in model.named_modules() if module is head_module and name in modules), None)
    tied = head_module is not None and input_module is not None and head_module.weight is input_module.weight
    return BaseSpec(
        identity,
        fingerprint,
        modules,
        head,
        tied,
        lambda name: _weight(model.get_submodule(name)),
        aliases,
        bias=lambda name: _bias(model.get_submodule(name)),
        norms=_norms(model),
    )


def _norms(model: nn.Module) -> dict[str, int]:
    """Norms over the model's whole width, by name: those over single heads do not see a token as a row."""
    config: Any = model.config
    width = int(config.get_text_config(decoder=True).hidden_size)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor) and weight.shape == (width,):
            found[name] = width
    return found


def _scales(embedding: nn.Module) -> bool:
    scale = getattr(embedding, "embed_scale", None)
    return isinstance(scale, int | float) or (isinstance(scale, torch.Tensor) and scale.numel() == 1)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = _weight(module)
    return weight.shape[0], weight.shape[1]


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _bias(module: nn.Module) -> torch.Tensor:
    bias = module.bias
    assert isinstance(bias, torch.Tensor)
    return bias


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    module = getattr(model, getter)()
    return module if isinstance(module, nn.Module) else None
