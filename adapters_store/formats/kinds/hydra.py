"""Hydra (arXiv 2309.06922): one low-rank branch beside a module and one behind it, both with biases."""

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import LowRank

_PARALLEL, _SEQUENTIAL = "hydra_par", "hydra_seq"
_PARTS = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")


class HydraConfig(TunerConfig):
    """r: of each branch; hydra_scale: what both are multiplied by."""

    hydra_scale: float = 1.0


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    target.bound_rank(2 * target.rank)
    rank = target.rank
    shapes: dict[str, tuple[int, ...]] = {}
    for branch, inputs in ((_PARALLEL, target.inputs), (_SEQUENTIAL, target.outputs)):
        sizes = ((rank, inputs), (rank,), (target.outputs, rank), (target.outputs,))
        shapes |= {f"{branch}.{part}": size for part, size in zip(_PARTS, sizes, strict=True)}
    return shapes


def _forms(target: Target) -> list[LowRank]:
    """`s (B_p (A_p x + c_p) + e_p) + s (B_s (A_s y + c_s) + e_s)` with `y = W x + b`: A = [A_p; A_s W], B = [B_p, B_s].

    What does not depend on x becomes the delta's bias.
    """
    down, inner, up, outer = (target.tensor(f"{_PARALLEL}.{part}").double() for part in _PARTS)
    behind, behind_inner, back, back_outer = (target.tensor(f"{_SEQUENTIAL}.{part}").double() for part in _PARTS)
    weight, bias = target.weight().double(), target.bias()
    if bias is not None:
        behind_inner = behind_inner + behind @ bias.double()
    scale = target.file.config.hydra_scale
    a, b = torch.cat([down, behind @ weight]), torch.cat([up, back], 1)
    constant = up @ inner + outer + back @ behind_inner + back_outer
    d = torch.full((len(a),), scale, dtype=torch.float32)
    return [LowRank(a.float(), b.float(), d, (scale * constant).float())]


METHODS = (
    Method(
        kind="hydra",
        peft_type="HYDRA",
        config=HydraConfig,
        served="folded",
        note="A LoRA of twice the rank with a bias; the branch behind the module is carried through the base's weight.",
        source="arXiv 2309.06922",
        parts=frozenset(f"{branch}.{part}" for branch in (_PARALLEL, _SEQUENTIAL) for part in _PARTS),
        shapes=_shapes,
        forms=_forms,
    ),
)
