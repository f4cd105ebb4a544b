"""TLoRA (arXiv 2501.08727): a full-rank transform of the input and a residual, both as rings of small tensors."""

import math

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import InputTransform, LowRank

_MAX = 8  # tensors of one ring; real ones have 2 to 4
_TRANSFORM, _OUT, _IN = "tlora_A", "tlora_B", "tlora_C"


class TLoraConfig(TunerConfig):
    """r: of the ring of the transform; residual_r: of the residual's, whose delta has rank residual_r squared."""

    residual_r: int


def _check(config: TLoraConfig) -> None:
    if config.residual_r < 1:
        bad("has a `residual_r` below 1", "residual_r")


def _sizes(target: Target, ring: str) -> list[int]:
    """First dimension of each tensor of a ring, as the header has them."""
    found: list[int] = []
    while (part := f"{ring}.{len(found)}") in target:
        shape = target.entries[part].shape
        found.append(shape[0] if shape else 0)
    return found


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    rank, residual = target.rank, target.file.config.residual_r
    target.bound_rank(residual**2)
    shapes: dict[str, tuple[int, ...]] = {}
    for ring, whole in ((_TRANSFORM, target.inputs), (_OUT, target.outputs), (_IN, target.inputs)):
        sizes = _sizes(target, ring)
        if math.prod(sizes) != whole or not sizes:
            target.refuse(f"has {' x '.join(map(str, sizes)) or 'no'} rows in `{ring}`, which make no {whole}")
        for index, size in enumerate(sizes):
            inner = (size, size, rank, rank) if ring == _TRANSFORM else (size, residual, residual)
            shapes[f"{ring}.{index}"] = inner
    return shapes


def _forms(target: Target) -> list[InputTransform | LowRank]:
    """`W T + D`: T[i, j] = tr(A_1[i_1, j_1] ... A_n[i_n, j_n]), D[i, j] = tr(B_1[i_1] ... C_1[j_1] ...).

    The first part of an index counts slowest. Cutting D's ring in two makes factors of rank residual_r squared.
    """
    out, inside = _chain(target, _OUT), _chain(target, _IN)
    b = out.flatten(1)
    a = inside.transpose(1, 2).flatten(1).T.contiguous()
    return [InputTransform(_transform(target)[None].float()), LowRank(a.float(), b.float(), torch.ones(len(a)))]


def _chain(target: Target, ring: str) -> torch.Tensor:
    """float64 [rows, r, r]: the products of a ring's matrices, for every index."""
    found = target.tensor(f"{ring}.0").double()
    for index in range(1, len(_sizes(target, ring))):
        found = torch.einsum("iab,jbc->ijac", found, target.tensor(f"{ring}.{index}").double()).flatten(0, 1)
    return found


def _transform(target: Target) -> torch.Tensor:
    """float64 [in, in]."""
    found = target.tensor(f"{_TRANSFORM}.0").double()
    for index in range(1, len(_sizes(target, _TRANSFORM))):
        core = target.tensor(f"{_TRANSFORM}.{index}").double()
        rows, columns = found.shape[0] * core.shape[0], found.shape[1] * core.shape[1]
        found = torch.einsum("ijab,klbc->ikjlac", found, core).reshape(rows, columns, *found.shape[2:])
    return found.diagonal(dim1=-2, dim2=-1).sum(-1)


METHODS = (
    Method(
        kind="tlora",
        peft_type="TLORA",
        config=TLoraConfig,
        served="native",
        note="A dense transform of the input, and a low-rank delta.",
        source="arXiv 2501.08727",
        parts=frozenset(f"{ring}.{index}" for ring in (_TRANSFORM, _OUT, _IN) for index in range(_MAX)),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
