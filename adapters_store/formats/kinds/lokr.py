"""LoKr (LyCORIS, arXiv 2309.14859): the Kronecker product of two small matrices, each maybe of low rank."""

from typing import Literal

import torch

from adapters_store.formats.kinds.folding import delta, dense, fits, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form

_PARTS = frozenset(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))


class LoKrConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. `use_effective_conv2d` is of convolutions, the dropouts of training."""

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, as `peft.tuners.lokr.layer` chooses them."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    factor = dimension if factor == -1 else factor
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = m + 1
        while dimension % new_m != 0:
            new_m += 1
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > factor:
            break
        m, n = new_m, new_n
    return (n, m) if m > n else (m, n)


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    config, rank = target.file.config, target.rank
    out_1, out_2 = factorization(target.outputs, config.decompose_factor)
    in_1, in_2 = factorization(target.inputs, config.decompose_factor)
    whole_1 = not (config.decompose_both and rank < max(out_1, in_1) / 2)
    whole_2 = not rank < max(out_2, in_2) / 2
    found = {}
    for part, whole, rows, columns in (("w1", whole_1, out_1, in_1), ("w2", whole_2, out_2, in_2)):
        if whole:
            found[f"lokr_{part}"] = (rows, columns)
        else:
            found |= {f"lokr_{part}_a": (rows, rank), f"lokr_{part}_b": (rank, columns)}
    return found


def _factors(target: Target, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right factor; one of them is the identity where the matrix is whole."""
    if part not in target:
        return target.tensor(f"{part}_a"), target.tensor(f"{part}_b")
    whole = target.tensor(part)
    if whole.shape[0] < whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])


def _forms(target: Target) -> list[Form]:
    """kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2)."""
    (left_1, right_1), (left_2, right_2) = _factors(target, "lokr_w1"), _factors(target, "lokr_w2")
    rank = left_1.shape[1] * left_2.shape[1]
    scale = target.alpha(target.file.config.alpha) / target.rank
    if not fits(target, rank):
        first, second = left_1.double() @ right_1.double(), left_2.double() @ right_2.double()
        return dense(torch.kron(first, second) * scale)
    return delta(target, torch.kron(right_1, right_2), torch.kron(left_1, left_2), torch.full((rank,), scale))


METHODS = (
    Method(
        kind="lokr",
        peft_type="LOKR",
        config=LoKrConfig,
        served="folded",
        note="A LoRA whose rank is the product of its two matrices' ranks, or a dense delta where that is smaller.",
        source="arXiv 2309.14859",
        parts=_PARTS,
        shapes=_shapes,
        forms=_forms,
    ),
)
