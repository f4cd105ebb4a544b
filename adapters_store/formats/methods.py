"""Every method of adapting that is known: how its files are read, or why they are not."""

from collections.abc import Mapping
from typing import Any

from adapters_store.canonical import shorten
from adapters_store.formats import tuner_config
from adapters_store.formats.kinds import (
    adalora,
    chosen,
    cores,
    factors,
    full_rank,
    growing,
    hydra,
    nola,
    sara,
    sora,
    spectral,
    tlora,
    vera,
)
from adapters_store.formats.method import Method

METHODS: tuple[Method, ...] = (
    *adalora.METHODS,
    *vera.METHODS,
    *chosen.METHODS,
    *cores.METHODS,
    *factors.METHODS,
    *full_rank.METHODS,
    *growing.METHODS,
    *hydra.METHODS,
    *nola.METHODS,
    *sara.METHODS,
    *sora.METHODS,
    *spectral.METHODS,
    *tlora.METHODS,
)

# peft_type -> why an adapter of it is refused
DECLINED: Mapping[str, str] = {
    "LILY": "its router averages over all tokens of a batch, so an answer would depend on other requests",
}


def select(fields: Mapping[str, Any]) -> Method | None:
    """The method of a config; None: a LoRA that is served from its file as it is (`peft`).

    Raises AdapterInvalid `feature_unsupported` for a method that is declined or unknown.
    """
    name = str(fields["peft_type"])
    for method in METHODS:
        if method.peft_type == name and method.when(fields):
            return method
    if name != "LORA":
        reason = DECLINED.get(name, "no such method is known here")
        tuner_config.unsupported([f"peft_type {shorten(name, 40)} ({reason})"])
    return None
