"""What the methods that are not PEFT's have in common. Their files: `adapters_store/formats/FORMATS.md`."""

import math
from typing import Literal

from adapters_store.formats import peft_config
from adapters_store.formats.method import Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import TunerConfig, unsupported


class OutsideConfig(TunerConfig):
    """adapter_config.json of a method that PEFT does not have: targets as PEFT selects them, and alpha / r as scale."""

    lora_alpha: float = 8
    lora_dropout: float | None = 0.0
    bias: Literal["none"] = "none"


def check_lora(config: PeftConfig) -> None:
    """For methods whose authors train with PEFT's LoraConfig. Raises AdapterInvalid `feature_unsupported`."""
    if features := peft_config.unserved_features(config):
        unsupported(features)


def scale(target: Target) -> float:
    """alpha / r, or alpha / sqrt(r) where the config says rsLoRA, of the config's r."""
    alpha = target.alpha(target.file.config.lora_alpha)
    return alpha / (math.sqrt(target.rank) if getattr(target.file.config, "use_rslora", False) else target.rank)


def linear(target: Target) -> None:
    """Raises AdapterInvalid `feature_unsupported` on an embedding, which these methods do not define."""
    if target.spec.kind == "embedding":
        target.refuse("is an embedding, and the method is one of linear modules", "feature_unsupported")
