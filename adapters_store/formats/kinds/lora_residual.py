"""LoRAs trained over a base from which something was taken first: KaSA (arXiv 2412.06071), PiSSA (arXiv 2404.02948),
OLoRA (arXiv 2406.01775). Against the base itself that something comes back, with the opposite sign: twice the rank."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from adapters_store.formats.kinds import decomposed, lora_parts
from adapters_store.formats.kinds.folding import delta, refuse_kinds
from adapters_store.formats.method import Method, Shape, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.forms import Form

_DIAGONAL = "lora_diag"


def _check(config: PeftConfig) -> None:
    """`init_lora_weights` is what is served here, so it is not asked about."""
    lora_parts.check(config.model_copy(update={"init_lora_weights": True}), {"kasa_config"})


def _shapes(target: Target) -> dict[str, Shape]:
    refuse_kinds(target, "embedding")
    if target.rank >= min(target.inputs, target.outputs):
        target.refuse(f"is {target.outputs} x {target.inputs}, too small for rank {target.rank}")
    return lora_parts.shapes(target)


def _kasa_shapes(target: Target) -> dict[str, Shape]:
    refuse_kinds(target, "conv1d")
    return _shapes(target) | {_DIAGONAL: (target.rank,)}


def _olora_shapes(target: Target) -> dict[str, Shape]:
    refuse_kinds(target, "conv1d")
    return _shapes(target)


def _against(target: Target, taken: tuple[torch.Tensor, torch.Tensor], scale: torch.Tensor | None = None) -> list[Form]:
    """`B d A` less what was taken. taken: [out, r] and [r, in], of which only the product counts, not its signs."""
    trained = lora_parts.low_rank(target)
    b, a = taken
    d = trained.d if scale is None else trained.d * scale
    whole_a, whole_b = torch.cat([trained.a.float(), a]), torch.cat([trained.b.float(), -b], dim=1)
    return delta(target, whole_a, whole_b, torch.cat([d, torch.ones(len(a))]), trained.bias)


def _kasa(target: Target) -> list[Form]:
    """The least r singular values of the base are gone: `KasaLinearVariant`."""
    u, s, v = decomposed.least(target, target.rank)
    return _against(target, (u * s, v), target.tensor(_DIAGONAL))


def _pissa(target: Target) -> list[Form]:
    """The greatest r singular values of the base were the adapter's start: `LoraLayer.pissa_init`."""
    u, s, v = decomposed.singular(target, target.rank)
    return _against(target, (u * s[: target.rank], v))


def _olora(target: Target) -> list[Form]:
    """The first r columns of Q and rows of R were the adapter's start: `LoraLayer.olora_init`."""
    q, r = decomposed.orthogonal(target, target.rank)
    return _against(target, (q * lora_parts.scale(target), r))


def _starts(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: str(fields.get("init_lora_weights")).lower() == name


def _has_kasa(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("kasa_config"))


def _method(
    kind: str,
    when: Callable[[Mapping[str, Any]], bool],
    shapes: Callable[[Target], dict[str, Shape]],
    forms: Callable[[Target], Iterable[Form]],
    source: str,
) -> Method:
    return Method(
        kind=kind,
        peft_type="LORA",
        config=PeftConfig,
        served="folded",
        note="A LoRA of twice the rank: what was taken from the base before training comes back.",
        source=source,
        parts=lora_parts.PARTS | ({_DIAGONAL} if kind == "kasa" else set()),
        shapes=shapes,
        forms=forms,
        check=_check if kind != "kasa" else lambda config: lora_parts.check(config, {"kasa_config"}),
        when=when,
    )


METHODS = (
    _method("kasa", _has_kasa, _kasa_shapes, _kasa, "arXiv 2412.06071"),
    _method("pissa", _starts("pissa"), _shapes, _pissa, "arXiv 2404.02948"),
    _method("olora", _starts("olora"), _olora_shapes, _olora, "arXiv 2406.01775"),
)
