"""DeLoRA (arXiv 2503.18225): a LoRA whose ranks are normalised, with one learnt bound for their strength."""

from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import LowRank

_SMALLEST = 1e-4  # `peft.tuners.delora.layer`: norms are at least this


class DeloraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. `delora_lambda` and its pattern start what is then learnt and saved."""

    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    lambda_pattern: dict[str, float] | None = None


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    return {
        "delora_A": (target.rank, target.inputs),
        "delora_B": (target.outputs, target.rank),
        "delora_lambda": (1,),
        "delora_w_norm": (target.inputs,),
    }


def _forms(target: Target) -> list[LowRank]:
    """`B diag(lambda / (r |A_i| |B_i|)) A diag(norms of the base's columns)`; the norms are saved."""
    a, b = target.tensor("delora_A"), target.tensor("delora_B")
    norms = a.norm(dim=1).clamp(min=_SMALLEST) * b.norm(dim=0).clamp(min=_SMALLEST)
    return [LowRank(a * target.tensor("delora_w_norm"), b, target.tensor("delora_lambda") / target.rank / norms)]


METHODS = (
    Method(
        kind="delora",
        peft_type="DELORA",
        config=DeloraConfig,
        served="folded",
        note="A LoRA of rank r, normalised when it is loaded.",
        source="arXiv 2503.18225",
        parts=frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"}),
        shapes=_shapes,
        forms=_forms,
        check=refuse_bias,
    ),
)
