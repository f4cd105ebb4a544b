"""Which modules of the base model an adapter may target."""

from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.forms import BaseSpec, ModuleSpec
from server.model.facts import attention_shape

_NORM_TOLERANCE = 0.02  # bfloat16 keeps 8 bits


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
        **norm_facts(model),
        input_embedding=next((name for name, module in model.named_modules() if module is input_module), None),
        kv=_kv(model),
    )


def norm_facts(model: nn.Module) -> dict[str, Any]:
    """The fields of `BaseSpec` about norms over the model's whole width: those over single heads see no token as a row.

    A norm that neither multiplies with its weight nor with one plus it (Gemma) is left out.
    """
    config: Any = model.config
    width = int(config.get_text_config(decoder=True).hidden_size)
    norms, offsets, biases = {}, {}, set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor) and weight.shape == (width,):
            offset = _offset(module, weight)
            if offset is None:
                continue
            norms[name] = width
            if offset:
                offsets[name] = offset
            if getattr(module, "bias", None) is not None:
                biases.add(name)
    return {"norms": norms, "norm_offsets": offsets, "norm_biases": frozenset(biases)}


@torch.no_grad()
def _offset(norm: nn.Module, weight: torch.Tensor) -> float | None:
    """What the norm adds to its weight, 0 or 1, seen by a row that it leaves as it is: mean 0, mean square 1."""
    row = torch.ones_like(weight)
    row[1::2] = -1
    bias = getattr(norm, "bias", None)
    y = norm(row[None])[0]
    gain = (y - bias if isinstance(bias, torch.Tensor) else y) * row
    added, size = gain.float() - weight.float(), 1 + weight.float().abs()
    offset = 1.0 if float(added.median()) > 0.5 else 0.0
    exact = bool(((added - offset).abs() <= _NORM_TOLERANCE * size).all())
    return offset if exact else None


def _kv(model: nn.Module) -> tuple[int, int, int]:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    return (int(text.num_hidden_layers), *attention_shape(text)[1:])


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
