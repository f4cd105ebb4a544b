"""Every method of adapting that is known: how its files are read, or why they are not."""

from collections.abc import Mapping
from typing import Any

from adapters_store.canonical import shorten
from adapters_store.formats import tuner_config
from adapters_store.formats.kinds import (
    adalora,
    c3a,
    chosen,
    cores,
    deft,
    delora,
    factors,
    frod,
    full_rank,
    gralora,
    growing,
    hira,
    hra,
    hydra,
    loha,
    lokr,
    lora_residual,
    lora_shaped,
    miss,
    nola,
    osf,
    peanut,
    poly,
    psoft,
    randlora,
    sara,
    sora,
    spectral,
    tinylora,
    tlora,
    unilora,
    vblora,
    vera,
)
from adapters_store.formats.method import Method

METHODS: tuple[Method, ...] = (
    *adalora.METHODS,
    *c3a.METHODS,
    *chosen.METHODS,
    *cores.METHODS,
    *deft.METHODS,
    *delora.METHODS,
    *factors.METHODS,
    *frod.METHODS,
    *full_rank.METHODS,
    *gralora.METHODS,
    *growing.METHODS,
    *hira.METHODS,
    *hra.METHODS,
    *hydra.METHODS,
    *loha.METHODS,
    *lokr.METHODS,
    *lora_residual.METHODS,
    *lora_shaped.METHODS,
    *miss.METHODS,
    *nola.METHODS,
    *osf.METHODS,
    *peanut.METHODS,
    *poly.METHODS,
    *psoft.METHODS,
    *randlora.METHODS,
    *sara.METHODS,
    *sora.METHODS,
    *spectral.METHODS,
    *tinylora.METHODS,
    *tlora.METHODS,
    *unilora.METHODS,
    *vblora.METHODS,
    *vera.METHODS,
)

# peft_type -> why an adapter of it is refused
DECLINED: Mapping[str, str] = {
    "ADAMSS": "which outputs each of its parts changes is not in its file, but in a random clustering of the base",
    "LILY": "its router averages over all tokens of a batch, so an answer would depend on other requests",
    "WARA": "its wavelets mix neighbouring tokens, so a token would depend on later ones",
    "WELORE": "it compresses the base model, which no request can choose",
    "SLTRAIN": "it is a way to train the base model, as a low-rank and a sparse part, which no request can choose",
    "PELA": "it compresses the base model, which no request can choose",
    "LQ_LORA": "its LoRA is right only over the quantised base that was made with it, which is not served",
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
