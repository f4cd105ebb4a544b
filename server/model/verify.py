"""A short run at load that compares the prepared model with the unchanged one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from server.model.adapter_linear import AdapterEmbedding, AdapterLinear
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.kv_cache import KVCache
from server.model.step_context import AttentionCall, AttentionMetadata, StepContext

Forward = Callable[[BaseModel, StepContext, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_TOKENS = 8
_FIRST = 5  # tokens of the first step; the rest follow in a second, which must find the first's keys
_PAGE = 4
# Largest norm of the difference over the norm of the logits. Sound models stay below 1e-5 in fp32 and 0.02 in bf16.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOW_PRECISION_TOLERANCE = 0.05
_ROUNDED_TOLERANCE = 0.35
_FAILURES = (RuntimeError, ValueError, AttributeError, TypeError, LookupError, NotImplementedError)


@torch.inference_mode()
def plain_logits(base: BaseModel) -> torch.Tensor:
    """Logits of the probe by transformers' own eager code, before anything is replaced; float32 [tokens, vocab]."""
    base.model.set_attn_implementation("eager")
    tokens, positions = _probe(base)
    try:
        output = base.model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
    except _FAILURES as error:
        raise ModelLoadError(f"{base.architecture} does not run in transformers: {error}") from error
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def verify(
    base: BaseModel,
    context: StepContext,
    expected: torch.Tensor,
    forward: Forward,
    *,
    rounded: str = "",
    cached: torch.dtype | None = None,
) -> dict[int, AttentionCall]:
    """Run the probe in two steps over scattered pages; raise `ModelLoadError` unless the logits are `expected`.

    Returns what the attention of each layer was asked for.

    rounded: the option that lets them be roughly so; cached: type of the KV cache, by default the model's.
    """
    pages = torch.tensor([[2, 0]], dtype=torch.int32, device=base.device)
    shape = (base.num_layers, base.num_kv_heads, base.head_dim)
    context.cache = KVCache(3, *shape, dtype=cached or base.dtype, device=base.device, page_size=_PAGE)
    parts, attention = [], dict[int, AttentionCall]()
    hooks = [
        module.register_forward_pre_hook(_check_rows(base, context))
        for module in base.model.modules()
        if isinstance(module, AdapterLinear | AdapterEmbedding)
    ]
    try:
        for first, last in ((0, _FIRST), (_FIRST, _TOKENS)):
            context.observed = attention = {}
            parts.append(_step(base, context, pages, first, last, forward))
            _check_layers(base, attention)
    except _FAILURES as error:
        raise ModelLoadError(f"{base.architecture} does not run with paged attention: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        context.cache = context.attention = context.observed = None
    difference = float((torch.cat(parts) - expected).norm() / expected.norm())
    if rounded:
        if not difference <= _ROUNDED_TOLERANCE:
            raise ModelLoadError(
                f"{base.architecture} does not bear {rounded} (relative difference of its logits {difference:.2g}, at "
                f"most {_ROUNDED_TOLERANCE:g} is accepted). Serve it without."
            )
        return attention
    if not difference <= _TOLERANCE.get(base.dtype, _LOW_PRECISION_TOLERANCE):  # NaN fails too
        raise ModelLoadError(
            f"{base.architecture} gives other logits with paged attention (relative difference {difference:.2g}): "
            "its attention has a feature that is not supported."
        )
    return attention


def _step(
    base: BaseModel, context: StepContext, pages: torch.Tensor, first: int, last: int, forward: Forward
) -> torch.Tensor:
    tokens, positions = (values[first:last] for values in _probe(base))
    context.begin(
        AttentionMetadata(
            query_start=torch.tensor([0, last - first], dtype=torch.int32, device=base.device),
            kv_length=torch.tensor([last], dtype=torch.int32, device=base.device),
            block_table=pages,
            slots=pages[0, positions // _PAGE].long() * _PAGE + positions % _PAGE,
        )
    )
    return forward(base, context, tokens, positions, torch.arange(last - first, device=base.device))


def _check_rows(base: BaseModel, context: StepContext) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """A hook that refuses a module which sees other rows than the batch (an expert): adapters go by row."""

    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].numel() if isinstance(module, AdapterEmbedding) else inputs[0].numel() // inputs[0].shape[-1]
        if context.attention is not None and rows != len(context.attention.slots):
            name = context.module_names[module.index]
            raise ModelLoadError(f"{base.architecture} gives {name} only some rows of the batch: not supported.")

    return hook


def _check_layers(base: BaseModel, attention: dict[int, AttentionCall]) -> None:
    if sorted(attention) != list(range(base.num_layers)):
        raise ModelLoadError(f"{base.architecture} runs paged attention in layers {sorted(attention)} only.")
    config: Any = base.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * base.num_layers
    for layer, kind in enumerate(kinds):
        if (kind == "sliding_attention") and attention[layer].window is None:
            raise ModelLoadError(f"{base.architecture} does not tell the window of layer {layer}.")


def _probe(base: BaseModel) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(_TOKENS, device=base.device)
    return (positions * 37 + 11) % base.vocabulary, positions
