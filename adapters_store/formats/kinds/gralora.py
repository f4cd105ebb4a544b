"""GraLoRA (arXiv 2505.20355): a LoRA for each of k x k blocks of the weight, and maybe one over the whole."""

import torch

from adapters_store.formats.kinds.folding import delta, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form

_BLOCKS = ("gralora_A", "gralora_B")
_WHOLE = ("gralora_A_general.weight", "gralora_B_general.weight")


class GraloraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    bias: str = "none"
    init_weights: bool = True


def _check(config: GraloraConfig) -> None:
    refuse_bias(config)
    if config.gralora_k < 1 or config.r % config.gralora_k or config.hybrid_r < 0:
        bad("needs `gralora_k` of at least 1 that divides `r`, and `hybrid_r` of at least 0", "gralora_k")


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    rank, parts, hybrid = target.file.config.r, target.file.config.gralora_k, target.file.config.hybrid_r
    target.bound_rank(rank * parts + hybrid)
    if target.inputs % parts or target.outputs % parts:
        target.refuse(f"is {target.outputs} x {target.inputs}, which {parts} blocks do not divide")
    blocks = (parts, target.inputs // parts, rank), (parts, rank, target.outputs // parts)
    found: dict[str, tuple[int, ...]] = dict(zip(_BLOCKS, blocks, strict=True))
    return found | (
        dict(zip(_WHOLE, ((hybrid, target.inputs), (target.outputs, hybrid)), strict=True)) if hybrid else {}
    )


def _forms(target: Target) -> list[Form]:
    """Rank k r: output block j reads, of every input block l, the j-th r / k of its ranks."""
    config, (blocks_a, blocks_b) = target.file.config, (target.tensor(part) for part in _BLOCKS)
    parts, rank = config.gralora_k, config.r
    inner = rank // parts
    a = torch.zeros(parts, parts, inner, parts, target.inputs // parts)  # j, l, rank, then inputs by their block
    b = torch.zeros(parts, target.outputs // parts, parts, parts, inner)  # outputs by their block, then j, l, rank
    for block in range(parts):
        a[:, block, :, block] = blocks_a[block].T.reshape(parts, inner, -1)
        b[block, :, block] = blocks_b[block].T.reshape(-1, parts, inner)
    a, b = a.reshape(rank * parts, target.inputs), b.reshape(target.outputs, rank * parts)
    if config.hybrid_r:
        whole_a, whole_b = (target.tensor(part) for part in _WHOLE)
        a, b = torch.cat([a, whole_a]), torch.cat([b, whole_b], dim=1)
    return delta(target, a, b, torch.full((len(a),), config.alpha / (rank + config.hybrid_r)))


METHODS = (
    Method(
        kind="gralora",
        peft_type="GRALORA",
        config=GraloraConfig,
        served="folded",
        note="A LoRA of k times the rank, most of it zeros.",
        source="arXiv 2505.20355",
        parts=frozenset({*_BLOCKS, *_WHOLE}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
