"""A model with an adapter's forms applied as `adapters_store/forms.py` describes them: the oracle of importers."""

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from adapters_store.forms import (
    AdapterWeights,
    Context,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    OutputScale,
    ReplacedWeight,
    SignRows,
    Sparse,
)

Hooked = Any


def logits(base: Any, weights: AdapterWeights, ids: torch.Tensor) -> torch.Tensor:
    """float32 [1, T, vocabulary] of ids int64 [1, T], the base untouched."""
    model = copy.deepcopy(base)
    acts = _acting(ids[0].tolist(), list(weights.invocation))
    for name, forms in weights.modules.items():
        module = model.get_submodule(name)
        for form in forms:
            if isinstance(form, InputTransform):
                module.register_forward_hook(_where(acts, _transformed(form)))
        for form in forms:
            if not isinstance(form, InputTransform | OutputScale):
                module.register_forward_hook(_where(acts, _added(form)))
        for form in forms:
            if isinstance(form, OutputScale):
                module.register_forward_hook(_where(acts, _scaled(form)))
    with torch.inference_mode():
        found: torch.Tensor = _run(model, weights.context, ids)
    return found


def _run(model: Any, context: Context | None, ids: torch.Tensor) -> torch.Tensor:
    """Virtual tokens stand before the embeddings of the ids, or lie in the cache at the first positions."""
    found: torch.Tensor
    if context is None:
        found = model(ids, use_cache=False).logits
    elif context.embeddings is not None:
        embedded = model.get_input_embeddings()(ids)
        whole = torch.cat([context.embeddings[None], embedded], dim=1)
        found = model(inputs_embeds=whole, use_cache=False).logits[:, context.num_tokens :]
    else:
        assert context.keys is not None
        assert context.values is not None
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
        found = model(ids, past_key_values=cache).logits
    return found


def _acting(ids: list[int], invocation: list[int]) -> torch.Tensor | None:
    """bool [T, 1]: where the adapter acts; None: everywhere."""
    if not invocation:
        return None
    starts = [at for at in range(len(ids)) if ids[at : at + len(invocation)] == invocation]
    first = starts[-1] if starts else len(ids)
    return torch.arange(len(ids))[:, None] >= first


def _where(acts: torch.Tensor | None, hook: Hooked) -> Hooked:
    if acts is None:
        return hook

    def apply(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.where(acts, hook(module, inputs, output), output)

    return apply


def matrix(form: Dense | Sparse, columns: int) -> torch.Tensor:
    """float32, what the form multiplies with."""
    if isinstance(form, Sparse):
        rows = torch.arange(len(form.start) - 1).repeat_interleave(form.start.diff().long())
        found = torch.zeros(len(form.start) - 1, columns)
        found[rows, form.column.long()] = form.value
        return found
    if isinstance(form.weight, SignRows):
        bits = (form.weight.bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return form.scale[:, None] * (bits.flatten(1)[:, : form.weight.columns].float() * 2 - 1)
    return form.scale[:, None] * form.weight.float()


def _transformed(form: InputTransform) -> Hooked:
    def apply(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        pieces = x.view(*x.shape[:-1], form.blocks.shape[0], form.blocks.shape[1])
        moved = torch.einsum("...nj,nij->...ni", pieces, form.blocks).flatten(-2)
        found: torch.Tensor = type(module).forward(module, moved)
        return found

    return apply


def _added(form: Form) -> Hooked:
    def apply(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        is_embedding = isinstance(module, torch.nn.Embedding)
        if isinstance(form, ReplacedWeight):
            return F.linear(x, form.weight, form.bias)
        if isinstance(form, Sparse | Dense):
            columns = module.weight.shape[1] if is_embedding else x.shape[-1]
            delta = matrix(form, columns)
            return output + (delta[x] if is_embedding else F.linear(x, delta))
        if isinstance(form, GatedLowRank):
            return output + F.linear(F.linear(x, form.a.float()) * form.d * _gate(form, x), form.b.float(), form.bias)
        whole = form.widened()  # type: ignore[union-attr]
        low = F.embedding(x, whole.a.float().T) if is_embedding else F.linear(x, whole.a.float())
        return output + F.linear(low * whole.d, whole.b.float(), whole.bias)

    return apply


def _gate(form: GatedLowRank, x: torch.Tensor) -> torch.Tensor:
    scores = F.linear(x, form.router.float()).sigmoid().repeat_interleave(form.rank // len(form.router), dim=-1)
    scores = scores if form.router_bias is None else scores + form.router_bias
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : form.active]
    kept = torch.zeros_like(scores).scatter(-1, order, scores.gather(-1, order))
    return form.active * kept / kept.sum(-1, keepdim=True)


def _scaled(form: OutputScale) -> Hooked:
    def apply(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        found = output if form.scale is None else form.scale * output
        if form.pair is not None:
            halves = output.view(*output.shape[:-1], -1, 2, form.stride)
            found = found + form.pair * halves.flip(-2).flatten(-3)
        return found if form.bias is None else found + form.bias

    return apply
