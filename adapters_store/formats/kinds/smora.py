"""SMoRA (arXiv 2501.15103): a router of its own chooses, for each token, which ranks of a LoRA act.

As the authors' code writes it (github.com/StyxXuan/smora, `peft_type` SRMOLE): the biased score is also the gate's
value, and the scale is alpha over the ranks in use.
"""

import torch

from adapters_store.formats import peft_config
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad, unsupported
from adapters_store.forms import GatedLowRank


class SmoraConfig(PeftConfig):
    """adapter_config.json of the authors' fork of PEFT."""

    activate_r: int = 8  # how many ranks a token uses
    rank_partition: int = 1  # neighbouring ranks that share a row of the router
    init_r: int | None = None  # of the first training only
    epsilon_greedy: bool = False  # read nowhere in the forward pass
    dense_compute: bool = False  # another way to compute the same


def _check(config: SmoraConfig) -> None:
    if features := peft_config.unserved_features(config):
        unsupported(features)
    unknown = ("use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")  # to the authors' code, with this method
    if found := [name for name in unknown if getattr(config, name)]:
        unsupported([f"{', '.join(found)} with SRMOLE"])
    if config.activate_r < 1:
        bad(f"has `activate_r` {config.activate_r}; a token uses at least one rank", "activate_r")
    if config.activate_r > config.r:
        bad(f"has `activate_r` {config.activate_r}, but only `r` {config.r} ranks to choose from", "activate_r")
    if config.rank_partition < 1 or config.r % config.rank_partition:
        bad(f"has `rank_partition` {config.rank_partition}, which does not divide `r` {config.r}", "rank_partition")


def _shapes(target: Target) -> Shapes:
    if target.spec.kind == "embedding":
        target.refuse("is an embedding, for which there is no router", "feature_unsupported")
    config = target.file.config
    return {
        "lora_A.weight": (config.r, target.inputs),
        "lora_B.weight": (target.outputs, config.r),
        "lora_router.weight": (config.r // config.rank_partition, target.inputs),
        "lora_biases": (config.r,),
    }


def _forms(target: Target) -> list[GatedLowRank]:
    config = target.file.config
    a, b = target.raw("lora_A.weight"), target.raw("lora_B.weight")
    dtype = torch.promote_types(a.dtype, b.dtype)
    d = torch.full((config.r,), config.lora_alpha / config.activate_r, dtype=torch.float32)
    router, bias = target.raw("lora_router.weight"), target.tensor("lora_biases")
    return [GatedLowRank(a.to(dtype), b.to(dtype), d, router, bias if bool(bias.any()) else None, config.activate_r)]


METHODS = (
    Method(
        kind="smora",
        peft_type="SRMOLE",
        config=SmoraConfig,
        served="native",
        note="Each token uses the ranks that its router chooses; the load-balance biases of training are part of it.",
        source="arXiv 2501.15103",
        parts=frozenset({"lora_A.weight", "lora_B.weight", "lora_router.weight", "lora_biases"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
