"""Every method of adapting that is known: how its files are read, or why they are not."""

from collections.abc import Mapping
from typing import Any

from adapters_store.canonical import shorten
from adapters_store.formats import tuner_config
from adapters_store.formats.kinds import (
    adalora,
    alora,
    beft,
    boft,
    c3a,
    chosen,
    cores,
    deft,
    delora,
    dora,
    factors,
    frod,
    full_rank,
    glora,
    gralora,
    growing,
    hira,
    hra,
    hydra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora_residual,
    lora_shaped,
    miss,
    nola,
    oft,
    osf,
    peanut,
    poly,
    prompts,
    psoft,
    randlora,
    road,
    sara,
    shira,
    smora,
    sora,
    spectral,
    spectrum,
    supertuning,
    tinylora,
    tlora,
    tokens,
    unilora,
    vblora,
    vera,
)
from adapters_store.formats.method import Method

METHODS: tuple[Method, ...] = (
    *adalora.METHODS,
    *alora.METHODS,
    *beft.METHODS,
    *boft.METHODS,
    *c3a.METHODS,
    *chosen.METHODS,
    *cores.METHODS,
    *deft.METHODS,
    *delora.METHODS,
    *dora.METHODS,
    *factors.METHODS,
    *frod.METHODS,
    *full_rank.METHODS,
    *glora.METHODS,
    *gralora.METHODS,
    *growing.METHODS,
    *hira.METHODS,
    *hra.METHODS,
    *hydra.METHODS,
    *ia3.METHODS,
    *ln_tuning.METHODS,
    *loha.METHODS,
    *lokr.METHODS,
    *lora_residual.METHODS,
    *lora_shaped.METHODS,
    *miss.METHODS,
    *nola.METHODS,
    *oft.METHODS,
    *osf.METHODS,
    *peanut.METHODS,
    *poly.METHODS,
    *prompts.METHODS,
    *psoft.METHODS,
    *randlora.METHODS,
    *road.METHODS,
    *sara.METHODS,
    *shira.METHODS,
    *smora.METHODS,
    *sora.METHODS,
    *spectral.METHODS,
    *spectrum.METHODS,
    *supertuning.METHODS,
    *tinylora.METHODS,
    *tlora.METHODS,
    *tokens.METHODS,
    *unilora.METHODS,
    *vblora.METHODS,
    *vera.METHODS,
)

# peft_type -> why an adapter of it is refused
DECLINED: Mapping[str, str] = {
    "ADAMSS": "which outputs each of its parts changes is not in its file, but in a random clustering of the base",
    "ADAPTION_PROMPT": "its gated second attention over a prompt of each layer is none that this server computes",
    "LILY": "its router averages over all tokens of a batch, so an answer would depend on other requests",
    "LQ_LORA": "its LoRA is right only over the quantised base that was made with it, which is not served",
    "PELA": "it compresses the base model, which no request can choose",
    "SHADOW": "a second network runs beside the base and changes every layer's input",
    "SLTRAIN": "it is a way to train the base model, as a low-rank and a sparse part, which no request can choose",
    "WARA": "its wavelets mix neighbouring tokens, so a token would depend on later ones",
    "WELORE": "it compresses the base model, which no request can choose",
    "XLORA": "it runs every step twice, the first time to weigh several LoRAs that are not in the file",
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
