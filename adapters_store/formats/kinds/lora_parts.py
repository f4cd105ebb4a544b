"""What the variants of a LoRA share: the factors of `peft.tuners.lora`, their shapes and their scale."""

import math
from collections.abc import Collection

import torch

from adapters_store.formats import peft_config
from adapters_store.formats.method import Shape, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad, unsupported
from adapters_store.forms import LowRank

PARTS = frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"})
_LARGEST_SCALE = 1e30  # beyond it even the smallest normal factors overflow float32


def check(config: PeftConfig, served: Collection[str]) -> None:
    """served: fields of the config that the variant is about. Raises AdapterInvalid `feature_unsupported`."""
    features = peft_config.unserved_features(config, served)
    if config.ensure_weight_tying:
        features.append("ensure_weight_tying")
    if features:
        unsupported(features)


def shapes(target: Target) -> dict[str, Shape]:
    """Of the factors, and of B's bias where the config has one."""
    config, rank = target.file.config, target.rank
    target.bound_rank(rank)
    prefix, suffix = ("lora_embedding_", "") if target.spec.kind == "embedding" else ("lora_", ".weight")
    found: dict[str, Shape] = {
        f"{prefix}A{suffix}": (rank, target.inputs),
        f"{prefix}B{suffix}": (target.outputs, rank),
    }
    if config.lora_bias:
        if prefix != "lora_":
            bad("has `lora_bias`, which does not go with an embedding target", "lora_bias")
        found["lora_B.bias"] = (target.outputs,)
    return found


def scale(target: Target) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, without the base's own scale of an embedding."""
    config, rank = target.file.config, target.rank
    found = target.alpha(config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)
    if abs(found) > _LARGEST_SCALE:
        target.refuse(f"has the scale {found:.3g}", "bad_config", "lora_alpha")
    return found


def low_rank(target: Target) -> LowRank:
    """The delta as `peft.tuners.lora.layer` computes it; factors in the wider of the file's two types."""
    prefix, suffix = ("lora_embedding_", "") if target.spec.kind == "embedding" else ("lora_", ".weight")
    a, b = target.raw(f"{prefix}A{suffix}"), target.raw(f"{prefix}B{suffix}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    factor = scale(target) * target.spec.scale
    bias = target.tensor("lora_B.bias") * factor if "lora_B.bias" in target else None
    return LowRank(a.to(dtype), b.to(dtype), torch.full((len(a),), factor, dtype=torch.float32), bias)
