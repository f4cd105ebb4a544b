"""Trained singular values of the base's own weights: SVFit (arXiv 2409.05926), SALT (arXiv 2503.16055); and the same
with a triangular decomposition, LoLDU (arXiv 2410.13618).

The decompositions are made from the base's own weights. Singular values of one size, and pivots, may come
out in another order elsewhere; the sign of a pair of singular vectors cancels, but for SALT's low-rank part.
"""

import torch

from adapters_store.formats.kinds import decomposed, outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Dense, LowRank, SharedBasis

_SIGMA = "svfit_sigma"
_SCALE, _SHIFT, _X, _Y = "trainable_scale_A", "trainable_shift_B", "trainable_X", "trainable_Y"
_PARAMETRIZED = "parametrizations.weight.0."  # where `torch.nn.utils.parametrize` keeps what LoLDU trains
_Z, _FACTOR = f"{_PARAMETRIZED}vector_z", f"{_PARAMETRIZED}scaling_factor"


class SaltConfig(TunerConfig):
    """r: rank of X Y; relu: whether the new matrix of singular values goes through it, as in the released code."""

    relu: bool = True


def _smaller(target: Target) -> int:
    """How many singular values the weight has."""
    outside.linear(target)
    return min(target.inputs, target.outputs)


def _check_rank(target: Target) -> int:
    if target.rank > _smaller(target):
        target.refuse(f"has no {target.rank} singular values")
    target.bound_rank(target.rank)
    return target.rank


def _svfit_shapes(target: Target) -> Shapes:
    return {_SIGMA: (_check_rank(target),)}


def _svfit_forms(target: Target) -> list[SharedBasis]:
    """`U (sigma' - sigma) V` of the largest r singular values: the rest of W stays."""
    left, values, right = decomposed.singular(target, target.rank)
    return [SharedBasis(left, right, target.tensor(_SIGMA) - values[: target.rank])]


def _salt_shapes(target: Target) -> Shapes:
    count = target.entries[_SCALE].shape[0] if _SCALE in target and target.entries[_SCALE].shape else 0
    left = _smaller(target) - count
    if left < 0:
        target.refuse(f"scales {count} singular values of {_smaller(target)}")
    shapes: dict[str, tuple[int, ...]] = {_SCALE: (count,), _SHIFT: (count,)}
    return {**shapes, _X: (left, target.rank), _Y: (target.rank, left)}


def _salt_forms(target: Target) -> list[LowRank | Dense]:
    """Sigma' is `scale * sigma + shift` for the first singular values and `diag(sigma) + X Y` for the others."""
    left, values, right = decomposed.singular(target, min(target.inputs, target.outputs))
    scale, shift, x, y = (target.tensor(part) for part in (_SCALE, _SHIFT, _X, _Y))
    count = len(scale)
    if target.file.config.relu:
        changed = torch.diag(values)
        changed[:count, :count] = torch.diag(scale * values[:count] + shift)
        changed[count:, count:] += x @ y
        delta = left.double() @ (changed.relu() - torch.diag(values)).double() @ right.double()
        return [Dense(delta.float(), torch.ones(target.outputs))]
    a = torch.cat([right[:count], (y.double() @ right[count:].double()).float()])
    b = torch.cat([left[:, :count], (left[:, count:].double() @ x.double()).float()], 1)
    return [LowRank(a, b, torch.cat([(scale - 1) * values[:count] + shift, torch.ones(target.rank)]))]


def _loldu_shapes(target: Target) -> Shapes:
    return {_Z: (_check_rank(target),), _FACTOR: ()}


def _loldu_forms(target: Target) -> list[SharedBasis]:
    """`W = P L diag(D) U`, both triangles with ones: the first r of D become `factor * z`, from `alpha / r * D`."""
    left, pivots, right = decomposed.triangular(target, target.rank)
    core = target.tensor(_FACTOR) * target.tensor(_Z) - outside.scale(target) * pivots
    return [SharedBasis(left, right, core)]


METHODS = (
    Method(
        kind="svfit",
        peft_type="SVFIT",
        config=TunerConfig,
        served="native",
        note="New singular values in a basis that all adapters of one rank share, the base's singular vectors.",
        source="arXiv 2409.05926",
        parts=frozenset({_SIGMA}),
        shapes=_svfit_shapes,
        forms=_svfit_forms,
    ),
    Method(
        kind="salt",
        peft_type="SALT",
        config=SaltConfig,
        served="native",
        note="A dense delta, since the released code puts a ReLU over all; with `relu` false a LoRA of rank q + r.",
        source="arXiv 2503.16055",
        parts=frozenset({_SCALE, _SHIFT, _X, _Y}),
        shapes=_salt_shapes,
        forms=_salt_forms,
    ),
    Method(
        kind="loldu",
        peft_type="LOLDU",
        config=OutsideConfig,
        served="native",
        note="New pivots in a basis that all adapters of one rank share, the base's triangular factors.",
        source="arXiv 2410.13618",
        parts=frozenset({_Z, _FACTOR}),
        shapes=_loldu_shapes,
        forms=_loldu_forms,
    ),
)
