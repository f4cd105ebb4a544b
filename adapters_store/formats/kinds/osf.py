"""OSF (arXiv 2504.07097): the lesser part of the base's singular value decomposition, trained anew."""

import torch

from adapters_store.formats.kinds import decomposed
from adapters_store.formats.kinds.folding import delta, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form

_U, _S, _V = (f"osf_svd_params.{part}" for part in ("U_low", "S_low", "V_low"))


class OSFConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    effective_rank: int | float | None = None
    rank_pattern: dict[str, float] | None = None  # type: ignore[assignment]  # a number, or a part of 1
    target_svd_config: dict[str, int] | None = None
    init_weights: bool | None = True


def _shapes(target: Target) -> Shapes:
    """The file's own S says how much of the base was kept; a fraction in the config is rounded to that."""
    refuse_kinds(target, "embedding", "conv1d")
    smaller = min(target.inputs, target.outputs)
    found = target.length(_S, 0)
    if found >= smaller:
        target.refuse(f"has {smaller} singular values, of which at least one must be kept; the file has {found}")
    return {_U: (target.outputs, found), _S: (found,), _V: (found, target.inputs)}


def _forms(target: Target) -> list[Form]:
    """`U S V - U0 S0 V0` of twice the rank: what is trained against what it was."""
    u, s, v = decomposed.least(target, target.length(_S, 0))
    b = torch.cat([target.tensor(_U) * target.tensor(_S), -u * s], dim=1)
    return delta(target, torch.cat([target.tensor(_V), v]), b)


METHODS = (
    Method(
        kind="osf",
        peft_type="OSF",
        config=OSFConfig,
        served="native",
        note="A delta against the base's own lesser singular values, dense unless few of them were trained.",
        source="arXiv 2504.07097",
        parts=frozenset({_U, _S, _V}),
        shapes=_shapes,
        forms=_forms,
    ),
)
