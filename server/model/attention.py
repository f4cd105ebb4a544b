"""Paged attention under transformers' attention interface: any model that uses it gets ours."""

from typing import Any

import torch
from transformers import AttentionInterface

from kernels import dispatch
from server.model.errors import ModelLoadError
from server.model.step_context import AttentionCall, StepContext

NAME = "polyrank"


def register() -> None:
    """Make `set_attn_implementation("polyrank")` known to transformers. May be called again.

    No mask function is registered: without one transformers skips making masks altogether, and the search for packed
    sequences in the positions with it. Causality and windows are the kernel's work.
    """
    AttentionInterface.register(NAME, polyrank_attention)


def polyrank_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Store the keys and values of this step's rows, then attend to all keys of each row's request.

    Those of virtual tokens that an adapter gives as keys and values are exchanged before, so the cache holds them.
    query: [1, heads, T, dim]; key, value: [1, kv_heads, T, dim]; returns [1, T, heads, dim]. `sliding_window` counts
    keys with the query's own, as in transformers' mask (`kv > q - window`) and in the kernel. `scaling` None means
    1 / sqrt(dim). The step's metadata come from `module.step_context`, which `prepare_model` attached.
    """
    context: StepContext = module.step_context
    layer: int = module.layer_idx
    if context.observed is not None:
        call = AttentionCall(scaling, sliding_window, softcap)
        _observe(context, module, layer, (query, key, value), attention_mask, call, kwargs)
    cache, metadata = context.cache, context.attention
    if cache is None or metadata is None:
        raise RuntimeError("attention ran before the model runner set the KV cache and the step")
    if context.prefixed and context.pool is not None:
        for rows in context.prefixed:
            rows.exchange(key[0].transpose(0, 1), context.pool, 2 * layer)
            rows.exchange(value[0].transpose(0, 1), context.pool, 2 * layer + 1)
    key_pool, value_pool = cache.layer(layer)
    out = dispatch.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        key_pool,
        value_pool,
        metadata.slots,
        metadata.query_start,
        metadata.kv_length,
        metadata.block_table,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return out[None], None


def _observe(
    context: StepContext,
    module: Any,
    layer: int,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    call: AttentionCall,
    kwargs: dict[str, Any],
) -> None:
    """Refuse, while the model is verified, what the kernel cannot do exactly."""
    name = type(module).__name__
    if mask is not None:
        raise ModelLoadError(f"{name} brings its own attention mask (position bias?), which is not supported.")
    if kwargs.get("s_aux") is not None:
        raise ModelLoadError(f"{name} uses attention sinks, which are not supported.")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ModelLoadError(f"{name} attends in both directions; only causal models can be served.")
    query, key, value = states
    expected = context.cache.layer(layer)[0].shape[2:] if context.cache is not None else None
    found = (key.shape[1], key.shape[3])
    if key.shape != value.shape or query.shape[2] != key.shape[2] or found != expected:
        raise ModelLoadError(
            f"{name} of layer {layer} has keys {tuple(key.shape)} and values {tuple(value.shape)}; every layer "
            f"must have the same number of key-value heads and the same size of keys and values {expected}."
        )
    if context.observed is None or layer in context.observed:
        raise ModelLoadError(f"{name} of layer {layer} runs more than once in a step, which is not supported.")
    context.observed[layer] = call
