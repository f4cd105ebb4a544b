"""LoHa (arXiv 2108.06098, LyCORIS arXiv 2309.14859): the elementwise product of two low-rank deltas."""

import torch

from adapters_store.formats.kinds.folding import delta, dense, fits, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHaConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. `use_effective_conv2d` is of convolutions, the dropouts of training."""

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    left, right = (target.outputs, target.rank), (target.rank, target.inputs)
    return dict(zip(_PARTS, (left, right, left, right), strict=True))


def _forms(target: Target) -> list[Form]:
    """`(W1a W1b) * (W2a W2b)` has rank r^2: its factors are the rows' and the columns' products of every pair."""
    rank, (w1_a, w1_b, w2_a, w2_b) = target.rank, (target.tensor(part) for part in _PARTS)
    scale = target.alpha(target.file.config.alpha) / rank
    if not fits(target, rank * rank):
        return dense((w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double()) * scale)
    b = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    a = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return delta(target, a, b, torch.full((rank * rank,), scale))


METHODS = (
    Method(
        kind="loha",
        peft_type="LOHA",
        config=LoHaConfig,
        served="folded",
        note="A LoRA of rank r squared, or a dense delta where that is smaller or the rank beyond the limit.",
        source="arXiv 2108.06098",
        parts=frozenset(_PARTS),
        shapes=_shapes,
        forms=_forms,
    ),
)
