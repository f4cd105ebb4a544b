"""DEFT (`peft.tuners.deft`): takes a subspace out of the base's weight, and puts a learnt part in its place; PaRa
(arXiv 2406.05641) only takes."""

from typing import Literal

import torch

from adapters_store.formats.kinds.folding import delta, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form


class DeftConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"


def _rank(target: Target) -> int:
    return min(int(target.file.config.r), target.outputs)


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    injected = {} if target.file.config.para else {"deft_R": (_rank(target), target.inputs)}
    return {"deft_P": (target.outputs, _rank(target)), **injected}


def _forms(target: Target) -> list[Form]:
    """`Q (s R - right' W)`, or `-Q right' W`: rank r."""
    config = target.file.config
    q = right = target.tensor("deft_P")
    if config.decomposition_method == "qr":
        q = right = torch.linalg.qr(q)[0]
    else:
        right = q.relu()
    a = -(right.T.double() @ target.weight().double())
    if not config.para:
        a += target.tensor("deft_R").double() * (config.alpha / _rank(target) if config.alpha else 1.0)
    return delta(target, a, q)


METHODS = (
    Method(
        kind="deft",
        peft_type="DEFT",
        config=DeftConfig,
        served="folded",
        note="A LoRA of rank r, made from the base's weights.",
        source="PEFT's peft.tuners.deft; PaRa: arXiv 2406.05641",
        parts=frozenset({"deft_P", "deft_R"}),
        shapes=_shapes,
        forms=_forms,
        check=refuse_bias,
    ),
)
