"""Decoder layers of the Llama kind on a GPU: what stands between their products in one kernel each.

transformers launches some forty kernels a layer, each of which waits for the one before: on an H100 a third of a decode
step of a model of 8 billion parameters went by between its products. What is left here is three for the norms, one for
the positions and one for the activation. Layers are recognised by their parts, and the model with them is compared with
the unchanged one before it serves (`server.model.verify`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels import dispatch_layer
from server.model.adapter_linear import AdapterNorm
from server.model.attention import polyrank_attention
from server.model.base import BaseModel
from server.model.decoder_layers import decoder_layers
from server.model.joined_linears import JoinedLinears, adapted_linears
from server.model.step_context import AttentionCall, StepContext

KNOWN = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm. weight: [size]; index: of the module, None if adapters cannot scale it."""

    weight: torch.Tensor
    eps: float
    index: int | None


class FusedLayer:
    """Stands for the `forward` of one layer; steps with more than low-rank deltas in it run as before.

    Raises ValueError if the layer has other parts than expected.
    """

    def __init__(self, layer: nn.Module, context: StepContext, call: AttentionCall) -> None:
        kind = type(layer)
        if f"{kind.__module__}.{kind.__qualname__}" not in KNOWN:
            raise ValueError(f"{kind.__qualname__} is not known")
        layer_parts = _parts(layer, _LAYER)
        mlp, own = _parts(layer_parts["mlp"], _MLP), _parts(layer_parts["self_attn"], _ATTENTION, _HEAD_NORMS)
        groups = (
            adapted_linears([own["q_proj"], own["k_proj"], own["v_proj"]]),
            adapted_linears([own["o_proj"]]),
            adapted_linears([mlp["gate_proj"], mlp["up_proj"]]),
            adapted_linears([mlp["down_proj"]]),
        )
        if not _is_silu(mlp["act_fn"]):
            raise ValueError("its activation is not SiLU")
        self._norm = _norm(layer_parts["input_layernorm"])
        self._mlp_norm = _norm(layer_parts["post_attention_layernorm"])
        self._head_norms = [_norm(own[name]) for name in sorted(_HEAD_NORMS, reverse=True) if name in own]
        self._attention, self._call = layer_parts["self_attn"], call
        self._context, self.own = context, layer.forward
        self._dim = int(self._attention.head_dim)  # type: ignore[arg-type]
        linears = [JoinedLinears(group, context) for group in groups]  # last, for it moves the weights
        self._qkv, self._o, self._gate_up, self._down = linears
        norms = [norm.index for norm in (self._norm, self._mlp_norm, *self._head_norms) if norm.index is not None]
        self._indices = frozenset([*norms, *(index for joined in linears for index in joined.indices)])

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own: [1, T, hidden] to the same."""
        positions = kwargs.get("position_embeddings")
        if args or positions is None or (self._context.special and not self._indices.isdisjoint(self._context.special)):
            return self.own(hidden_states, *args, **kwargs)
        cos, sin = (part[0] for part in positions)
        x = hidden_states[0]
        _, normed = dispatch_layer.add_rms_norm(x, None, self._norm.weight, self._norm.eps)
        [attended] = self._o(self._attend(normed, cos, sin))
        x, normed = dispatch_layer.add_rms_norm(x, attended, self._mlp_norm.weight, self._mlp_norm.eps)
        gate, up = self._gate_up(normed)
        [given] = self._down(dispatch_layer.silu_mul(gate, up))
        return (x + given)[None]

    def _attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, heads * dim]."""
        query, key, value = (part.view(len(x), -1, self._dim) for part in self._qkv(x))
        if self._head_norms:
            for rows, norm in zip((query, key), self._head_norms, strict=True):
                dispatch_layer.rotate(rows, cos, sin, norm.weight, norm.eps)
        else:  # they lie side by side
            heads = query.shape[1] + key.shape[1]
            dispatch_layer.rotate(query.as_strided((len(x), heads, self._dim), query.stride()), cos, sin)
        query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
        call = self._call
        out, _ = polyrank_attention(self._attention, query, key, value, None, call.scaling, call.window, call.softcap)
        return out.flatten(2)[0]


def fuse_layers(base: BaseModel, context: StepContext, attention: Mapping[int, AttentionCall]) -> list[nn.Module]:
    """Give every layer of a prepared model that has the parts its `FusedLayer`; returns these.

    attention: of each layer, as `verify` saw it.
    """
    fused, reasons = [], set[str]()
    for index, layer in enumerate(decoder_layers(base)):
        try:
            layer.forward = FusedLayer(layer, context, attention[index])
        except ValueError as error:
            reasons.add(str(error))
        else:
            fused.append(layer)
    if reasons:
        log.info("layers_not_fused", extra={"fused": len(fused), "reason": "; ".join(sorted(reasons))})
    return fused


def take_apart(layers: list[nn.Module]) -> None:
    """Undo `fuse_layers`; the weights stay joined, which changes nothing."""
    for layer in layers:
        assert isinstance(layer.forward, FusedLayer)
        layer.forward = layer.forward.own


def _parts(module: nn.Module, needed: set[str], optional: frozenset[str] = frozenset()) -> dict[str, nn.Module]:
    found = dict(module.named_children())
    if set(found) not in (needed, needed | optional):
        raise ValueError(f"{type(module).__name__} has other parts")
    return found


def _norm(module: nn.Module) -> Norm:
    """Raises ValueError unless the module computes what `add_rms_norm` does."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        raise ValueError(f"{type(module).__name__} is no RMSNorm")
    forward = module.forward
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    expected, (_, found) = forward(x), dispatch_layer.add_rms_norm(x, None, weight, eps)
    if not torch.allclose(found, expected, rtol=2**-6 if weight.dtype.itemsize == 2 else 1e-5):
        raise ValueError(f"{type(module).__name__} computes something else than an RMSNorm")
    return Norm(weight, eps, forward.index if isinstance(forward, AdapterNorm) else None)


def _is_silu(module: nn.Module) -> bool:
    x = torch.linspace(-6, 6, 64)
    return torch.allclose(module(x), nn.functional.silu(x), atol=1e-6)
