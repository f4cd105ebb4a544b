"""HiRA (ICLR 2025, OpenReview TwJrTz9cRS): a low-rank delta times the base's weight, element by element."""

from typing import Literal

from adapters_store.formats.kinds.folding import dense, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form


class HiraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    hira_dropout: float = 0.0
    init_weights: bool | Literal["gaussian"] | None = True


def _shapes(target: Target) -> Shapes:
    """PEFT 0.21.2 forgets `rank_pattern` for a model's first adapter: files have either rank, and neither scales."""
    refuse_kinds(target, "embedding")
    rank = target.file.config.r if target.length("hira_A", 0) == target.file.config.r else target.rank
    return {"hira_A": (rank, target.inputs), "hira_B": (target.outputs, rank)}


def _forms(target: Target) -> list[Form]:
    """`W * (B A)`, of full rank whatever the rank of B A."""
    return dense(target.weight().double() * (target.tensor("hira_B").double() @ target.tensor("hira_A").double()))


METHODS = (
    Method(
        kind="hira",
        peft_type="HIRA",
        config=HiraConfig,
        served="native",
        note="A dense delta, made from the base's weights, each as large as the weight itself; not on embeddings.",
        source="OpenReview TwJrTz9cRS",
        parts=frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"}),
        shapes=_shapes,
        forms=_forms,
    ),
)
