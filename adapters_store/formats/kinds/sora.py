"""SoRA (arXiv 2311.11696): a LoRA whose ranks have gates, most of which training sets to zero."""

from adapters_store.formats.kinds import outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.forms import LowRank


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    rank = target.entries["lora.gate"].shape[-1] if "lora.gate" in target and target.entries["lora.gate"].shape else 0
    if rank > target.rank:
        target.refuse(f"holds {rank} ranks; the config says {target.rank}")
    return {"lora.lora_A": (rank, target.inputs), "lora.lora_B": (target.outputs, rank), "lora.gate": (1, rank)}


def _forms(target: Target) -> list[LowRank]:
    """`alpha / r * B (g * A x)`, r being that of training; a file may have dropped the ranks of zero gates already."""
    d = target.tensor("lora.gate").flatten() * outside.scale(target)
    kept = d != 0
    a, b = target.tensor("lora.lora_A")[kept], target.tensor("lora.lora_B")[:, kept]
    return [LowRank(a, b.contiguous(), d[kept])] if bool(kept.any()) else []


METHODS = (
    Method(
        kind="sora",
        peft_type="SORA",
        config=OutsideConfig,
        served="folded",
        note="A LoRA of as many ranks as have a gate; the gates become scales.",
        source="arXiv 2311.11696",
        parts=frozenset({"lora.lora_A", "lora.lora_B", "lora.gate"}),
        shapes=_shapes,
        forms=_forms,
    ),
)
