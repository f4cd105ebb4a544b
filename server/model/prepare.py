"""Makes a loaded model adapter-aware and paged, and runs it."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from server.model.adapter_linear import AdapterEmbedding, AdapterLinear, AdapterNorm
from server.model.attention import NAME, register
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.float_linear import float_linear
from server.model.fused_layer import fuse_layers, take_apart
from server.model.memory import move_to_huge_pages
from server.model.quantize import check_quantization, quantize
from server.model.shared_input import share_inputs, watch_inputs
from server.model.spec import adapter_kind
from server.model.step_context import AttentionCall, StepContext
from server.model.verify import plain_logits, verify

log = logging.getLogger(__name__)


def prepare_model(base: BaseModel, quantization: str = "none", cached: torch.dtype | None = None) -> StepContext:
    """Wrap every target module of `base.model` in place and give its attention layers our paged attention.

    Ends with a short comparison against the unchanged model, so that an architecture whose attention cannot be
    replaced exactly is refused here (`ModelLoadError`) and never serves wrong answers. Quantization ("int8") comes
    after that: what it changes must not hide what attention changes. A second comparison bounds it, with a KV cache of
    the type that will serve (`cached`).
    """
    check_quantization(quantization, base.device)
    context = StepContext((*base.spec.modules, *base.spec.norms), base.spec.head)
    expected = plain_logits(base)
    _wrap(base, context)
    _replace_attention(base, context)
    with watch_inputs(base) as seen:
        attention = verify(base, context, expected, forward)
    if base.device.type == "cuda":  # on a CPU each product is one call anyway, and the layers are compiled
        share_inputs(base, seen)
        _fuse(base, context, expected, attention)
    if quantization == "int8":
        quantize(base)
        verify(base, context, expected, forward, rounded="--quantize int8", cached=cached)
    elif cached not in (None, base.dtype):
        verify(base, context, expected, forward, rounded="this --kv-cache-dtype", cached=cached)
    move_to_huge_pages(base.model)
    return context


@torch.inference_mode()
def forward(
    base: BaseModel,
    context: StepContext,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logit_rows: torch.Tensor,
) -> torch.Tensor:
    """Run one step, which `context.begin` has described.

    input_ids, position_ids: int64 [T]; logit_rows: int64 [K], rows whose logits are wanted (K may be 0).
    Returns float32 [K, vocabulary], with the architecture's own scaling and capping of logits done.
    """
    output = base.model(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=logit_rows
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def _fuse(
    base: BaseModel, context: StepContext, expected: torch.Tensor, attention: Mapping[int, AttentionCall]
) -> None:
    """`fuse_layers` where the model gives the same logits with it."""
    fused = fuse_layers(base, context, attention)
    if not fused:
        return
    try:
        verify(base, context, expected, forward)
    except ModelLoadError as error:
        log.info("layers_not_fused", extra={"reason": str(error)})
        take_apart(fused)
    torch.cuda.empty_cache()  # where the weights were before they were joined: too small for what comes


def _wrap(base: BaseModel, context: StepContext) -> None:
    first = base.model.get_input_embeddings()
    for name in base.spec.norms:
        norm = base.model.get_submodule(name)
        norm.forward = AdapterNorm(norm, context, context.module_index[name])
    for name in base.spec.modules:
        index = context.module_index[name]
        parent_name, _, child = name.rpartition(".")
        parent = base.model.get_submodule(parent_name)
        module = getattr(parent, child)
        wrapper: nn.Module
        if adapter_kind(module) == "embedding":
            wrapper = AdapterEmbedding(module, context, index, first=module is first)
            context.embeds = context.embeds or module is first
        else:
            wrapper = AdapterLinear(float_linear(module), context, index, head=name == context.head)
        setattr(parent, child, wrapper)
    base.model.eval()


def _replace_attention(base: BaseModel, context: StepContext) -> None:
    register()
    base.model.set_attn_implementation(NAME)
    for module in base.model.modules():
        if hasattr(module, "layer_idx"):
            module.step_context = context
