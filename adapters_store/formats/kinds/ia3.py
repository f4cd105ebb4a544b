"""IA3 (arXiv 2205.05638): a factor for each output of a module, or for each input of a feed-forward one."""

from typing import ClassVar

from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form, InputTransform, OutputScale

_PART = "ia3_l"


class Ia3Config(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    least_rank: ClassVar[int] = 0

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True


def _on_inputs(target: Target) -> bool:
    """The shape says it. A config that lists names must agree (`IA3Model._check_target_module_feedforward`)."""
    shape = target.entries[_PART].shape
    found = shape == (1, target.inputs)
    listed = target.file.config.feedforward_modules
    shaped = found or shape == (target.outputs, 1)
    if isinstance(listed, list) and shaped and found != any(target.name.endswith(name) for name in listed):
        bad("has `feedforward_modules` that do not agree with the file's shapes", "feedforward_modules")
    return found


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    return {_PART: (1, target.inputs) if _on_inputs(target) else (target.outputs, 1)}


def _forms(target: Target) -> list[Form]:
    """`W (l * x) + b`, or `l * (W x + b)`."""
    factors = target.tensor(_PART)
    return [InputTransform(factors.reshape(-1, 1, 1)) if _on_inputs(target) else OutputScale(factors.flatten())]


METHODS = (
    Method(
        kind="ia3",
        peft_type="IA3",
        config=Ia3Config,
        served="native",
        note="A scale of each output, the base's bias included, or of each input of a feed-forward module.",
        source="arXiv 2205.05638",
        parts=frozenset({_PART}),
        shapes=_shapes,
        forms=_forms,
    ),
)
