"""Poly (arXiv 2202.13914): for each task a mixture of skills, each a LoRA over one part of the inputs and outputs."""

from typing import Literal

import torch

from adapters_store.formats.kinds.folding import delta, refuse_kinds
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form
from adapters_store.variants import NO_KNOBS, Knobs

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_SMALLEST = 1e-12  # `peft.tuners.poly.router`: keeps a sum of weights from zero


class PolyConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1


def _check(config: PolyConfig) -> None:
    if min(config.n_tasks, config.n_skills, config.n_splits) < 1:
        bad("needs `n_tasks`, `n_skills` and `n_splits` of at least 1", "n_tasks")


def _knobs(file: AdapterFile) -> Knobs:
    tasks = file.config.n_tasks
    return {"task": {"count": tasks}} if tasks > 1 else NO_KNOBS


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    config = target.file.config
    splits, skills, rank = config.n_splits, config.n_skills, config.r
    if target.inputs % splits or target.outputs % splits:
        target.refuse(f"is {target.outputs} x {target.inputs}, which {splits} splits do not divide")
    return {
        _A: (splits, skills, target.inputs // splits, rank),
        _B: (splits, skills, rank, target.outputs // splits),
        _LOGITS: (config.n_tasks, splits * skills),
    }


def _forms(target: Target) -> list[Form]:
    """`B A / r` of the request's task, or of the first: the skills of each split are added up, each with its weight."""
    config = target.file.config
    logits = target.tensor(_LOGITS)[target.file.variant.task or 0].view(config.n_splits, config.n_skills)
    weights = logits.sigmoid()
    weights = weights / (weights.sum(-1, keepdim=True) + _SMALLEST)
    a = torch.einsum("qs,qsdr->qdr", weights, target.tensor(_A)).reshape(target.inputs, config.r)
    b = torch.einsum("qs,qsrd->rqd", weights, target.tensor(_B)).reshape(config.r, target.outputs)
    return delta(target, a.T, b.T, torch.full((config.r,), 1 / config.r))


METHODS = (
    Method(
        kind="poly",
        peft_type="POLY",
        config=PolyConfig,
        served="folded",
        note="A LoRA of rank r for each task; a request may choose the task, else the first answers.",
        source="arXiv 2202.13914",
        parts=frozenset({_A, _B, _LOGITS}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
        knobs=_knobs,
    ),
)
