"""AdaLoRA (arXiv 2303.10512): a delta as a singular value decomposition whose rank was cut while training."""

from typing import Any

from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import unsupported
from adapters_store.forms import LowRank

_EPSILON = 1e-5  # `peft.tuners.adalora.layer`: divides by the rank without ever dividing by zero


class AdaLoraConfig(PeftConfig):
    """adapter_config.json of PEFT 0.21.2. All but the factors' shapes was for training."""

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  # PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None  # which ranks were kept, by module; the others are zero in the file


def _check(config: AdaLoraConfig) -> None:
    if config.bias != "none":
        unsupported([f'bias "{config.bias}"'])


def _shapes(target: Target) -> Shapes:
    rank = target.length("lora_E", 0)
    return {"lora_A": (rank, target.inputs), "lora_E": (rank, 1), "lora_B": (target.outputs, rank)}


def _forms(target: Target) -> list[LowRank]:
    """`alpha B (E A) / (init_r + 1e-5)`, whatever rank is left; ranks whose singular value is zero are left out."""
    config = target.file.config
    d = target.tensor("lora_E").flatten() * (config.lora_alpha / (config.init_r + _EPSILON))
    kept = d != 0
    a, b = target.raw("lora_A")[kept], target.raw("lora_B")[:, kept]
    return [LowRank(a, b, d[kept])] if bool(kept.any()) else []


METHODS = (
    Method(
        kind="adalora",
        peft_type="ADALORA",
        config=AdaLoraConfig,
        served="folded",
        note="A low-rank delta; the singular values become its scales, and ranks cut to zero are dropped.",
        source="arXiv 2303.10512",
        parts=frozenset({"lora_A", "lora_E", "lora_B"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
