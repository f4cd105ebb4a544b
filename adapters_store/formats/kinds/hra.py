"""HRA (arXiv 2405.17484): inputs pass a chain of Householder reflections before the base's weight."""

import torch

from adapters_store.formats.kinds.folding import delta, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form


class HRAConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    apply_GS: bool = False  # noqa: N815  # PEFT's name
    bias: str = "none"
    init_weights: bool = True


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    return {"hra_u": (target.inputs, target.file.config.r)}


def _forms(target: Target) -> list[Form]:
    """`W Q - W` of rank r: the compact form of the chain is Q = I - U T U', T upper triangular (Schreiber and
    Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989)."""
    target.bound_rank(target.file.config.r)
    directions = target.tensor("hra_u").double()
    if target.file.config.apply_GS:
        u = _orthonormal(directions)
        inner = 2 * torch.eye(u.shape[1], dtype=u.dtype)
    else:
        u = directions / directions.norm(dim=0)
        inner = _compact(u)
    return delta(target, u.T, -(target.weight().double() @ u) @ inner)


def _compact(u: torch.Tensor) -> torch.Tensor:
    """T [r, r] of the reflections by the unit columns of u, in their order."""
    rank = u.shape[1]
    found, products = torch.zeros(rank, rank, dtype=u.dtype), u.T @ u
    for k in range(rank):
        found[k, k] = 2
        found[:k, k] = -2 * found[:k, :k] @ products[:k, k]
    return found


def _orthonormal(u: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt's columns, one after another as PEFT makes them."""
    columns: list[torch.Tensor] = []
    for column in u.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


METHODS = (
    Method(
        kind="hra",
        peft_type="HRA",
        config=HRAConfig,
        served="folded",
        note="A LoRA of rank r, made from the base's weights.",
        source="arXiv 2405.17484",
        parts=frozenset({"hra_u"}),
        shapes=_shapes,
        forms=_forms,
        check=refuse_bias,
    ),
)
