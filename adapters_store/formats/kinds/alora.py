"""aLoRA (arXiv 2504.12397): a LoRA that acts from its invocation tokens on, so that the base's cache is kept before."""

from adapters_store.formats.kinds import lora_parts
from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad
from adapters_store.forms import Form

_FIELD = "alora_invocation_tokens"


def _check(config: PeftConfig) -> None:
    lora_parts.check(config, (_FIELD,))
    if min(config.alora_invocation_tokens or [-1]) < 0:
        bad(f"has `{_FIELD}` that are no token ids", _FIELD)


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    vocabulary = max(
        (spec.in_features for spec in target.file.base.modules.values() if spec.kind == "embedding"), default=0
    )
    if vocabulary and max(target.file.config.alora_invocation_tokens) >= vocabulary:
        bad(f"has `{_FIELD}` beyond the base's vocabulary of {vocabulary}", _FIELD)
    return lora_parts.shapes(target)


def _forms(target: Target) -> list[Form]:
    return [lora_parts.low_rank(target)]


METHODS = (
    Method(
        kind="alora",
        peft_type="LORA",
        config=PeftConfig,
        served="native",
        note="A low-rank delta that acts from the last occurrence of its invocation tokens in the prompt on.",
        source="arXiv 2504.12397",
        parts=lora_parts.PARTS,
        shapes=_shapes,
        forms=_forms,
        invocation=lambda config: tuple(config.alora_invocation_tokens),
        check=_check,
        when=lambda fields: fields.get(_FIELD) is not None,
    ),
)
