"""BEFT (arXiv 2509.15974): a bias for modules, whether the base has one or not."""

from typing import ClassVar

from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form, OutputScale

_PART = "beft_bias"


class BeftConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    least_rank: ClassVar[int] = 0

    init_weights: bool = True


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    return {_PART: (1, target.outputs)}


def _forms(target: Target) -> list[Form]:
    return [OutputScale(bias=target.tensor(_PART).flatten())]


METHODS = (
    Method(
        kind="beft",
        peft_type="BEFT",
        config=BeftConfig,
        served="native",
        note="A bias of each output.",
        source="peft.tuners.beft",
        parts=frozenset({_PART}),
        shapes=_shapes,
        forms=_forms,
    ),
)
