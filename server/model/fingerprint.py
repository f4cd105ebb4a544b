"""A digest that tells whether two loads are the same base model, whatever the dtype they are held in."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SAMPLES = 4096  # elements of each tensor that enter the digest
_FACTS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "activation_function", "max_position_embeddings",
    "rope_parameters", "sliding_window", "layer_types", "tie_word_embeddings",
)  # fmt: skip


def fingerprint(model: nn.Module, config: Any) -> str:
    """`sha256:<hex>` over architecture, shape facts, and every parameter's name, shape and sampled values.

    Values are rounded to bfloat16 first, so fp32 and bf16 loads of one checkpoint agree. (A float32 checkpoint held
    in float16 is rounded twice and may differ in a few ties; bf16 and fp16 checkpoints do not mind.)
    At most `SAMPLES` elements of a tensor are read, evenly spaced, the first and last included. That bounds the time
    (SmolLM2-135M 80 ms on 2 vCPU; an 8B model has about as many tensors, so about the same) and has a price: a change
    of a single element of a large matrix is seen only when it is one of the samples. It tells models apart; it is no
    checksum.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([type(model).__name__, _facts(config)], sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()))
    return f"sha256:{digest.hexdigest()}"


def _facts(config: Any) -> Mapping[str, Any]:
    return {name: getattr(config, name) for name in _FACTS if getattr(config, name, None) is not None}


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.reshape(-1)
    count = flat.numel()
    if count > SAMPLES:
        steps = torch.arange(SAMPLES, device=flat.device, dtype=torch.int64)
        flat = flat[steps * (count - 1) // (SAMPLES - 1)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().numpy().tobytes()
