"""LayerNorm tuning (arXiv 2312.11420): weights and biases of norms are trained, and saved whole."""

from typing import ClassVar

from adapters_store.formats.method import Method, Shape, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form, OutputScale

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


class LnTuningConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    least_rank: ClassVar[int] = 0


def _shapes(target: Target) -> Shapes:
    found: dict[str, Shape] = {_WEIGHT: (target.outputs,)}
    return {**found, _BIAS: (target.outputs,)} if target.spec.bias else found


def _forms(target: Target) -> list[Form]:
    """`w' n + b' = (w' / w) (w n + b) + b' - (w' / w) b`, w with what the norm adds to it."""
    offset = target.file.base.norm_offsets.get(target.name, 0.0)
    own = target.weight() + offset
    if bool((own == 0).any()):
        target.refuse("has a weight of 0 in the base, so that no scale of its output gives the trained one")
    ratio = (target.tensor(_WEIGHT) + offset) / own
    bias = target.bias()
    return [OutputScale(ratio, None if bias is None else target.tensor(_BIAS) - ratio * bias)]


METHODS = (
    Method(
        kind="ln_tuning",
        peft_type="LN_TUNING",
        config=LnTuningConfig,
        served="native",
        note="A scale and a bias of each norm's output, against the base's own weights.",
        source="arXiv 2312.11420",
        parts=frozenset({_WEIGHT, _BIAS}),
        shapes=_shapes,
        forms=_forms,
        norms=True,
    ),
)
