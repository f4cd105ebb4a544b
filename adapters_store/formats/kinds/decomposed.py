"""Decompositions of the base's own weights, each made once for all adapters that start from it.

A singular value decomposition of 576 x 576 takes 0.2 s on one core, of 1536 x 576 0.4 s (2-core VM, 2026-11-26), which
makes some 50 s for all modules of the built-in model.
"""

import torch

from adapters_store.formats.method import Target
from adapters_store.kept import Tensors


def singular(target: Target, rank: int) -> Tensors:
    """Of `W = U S V` the largest: U [out, rank], S [min(in, out)], V [rank, in]."""

    def make() -> Tensors:
        left, values, right = torch.linalg.svd(target.weight(factored=True), full_matrices=False)
        return left[:, :rank].clone(), values, right[:rank].clone()

    return target.file.base.kept.get(("singular", target.name, rank), make)


def least(target: Target, count: int) -> Tensors:
    """As `singular`, the smallest: U [out, count], S [count], V [count, in]."""

    def make() -> Tensors:
        left, values, right = torch.linalg.svd(target.weight(factored=True), full_matrices=False)
        return left[:, -count:].clone(), values[-count:].clone(), right[-count:].clone()

    return target.file.base.kept.get(("least", target.name, count), make)


def orthogonal(target: Target, rank: int) -> Tensors:
    """Of `W = Q R` the first: Q [out, rank], R [rank, in]."""

    def make() -> Tensors:
        q, r = torch.linalg.qr(target.weight(factored=True))
        return q[:, :rank].clone(), r[:rank].clone()

    return target.file.base.kept.get(("orthogonal", target.name, rank), make)


def singular_of_transposed(target: Target, rank: int) -> Tensors:
    """As `singular`, with the signs that a decomposition of `W^T` gives."""

    def make() -> Tensors:
        left, values, right = torch.linalg.svd(target.weight(factored=True).T, full_matrices=False)
        return right[:rank].T.contiguous(), values, left[:, :rank].T.contiguous()

    return target.file.base.kept.get(("singular_of_transposed", target.name, rank), make)


def triangular(target: Target, rank: int) -> Tensors:
    """Of `W = P L diag(D) U` with ones on both diagonals the first: P L [out, rank], D [rank], U [rank, in]."""

    def make() -> Tensors:
        permutation, lower, upper = torch.linalg.lu(target.weight(factored=True))
        pivots = torch.diagonal(upper)[:rank].clone()
        return (permutation @ lower)[:, :rank].clone(), pivots, upper[:rank] / pivots[:, None]

    return target.file.base.kept.get(("triangular", target.name, rank), make)
