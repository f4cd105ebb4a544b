"""Sums of low-rank deltas and their best approximations of lower rank; no dense matrix unless one is given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adapters_store.compression.singular import SingularForm, singular_form
from adapters_store.forms import LowRank
from adapters_store.merging.parts import Part

EXACT = 512  # a matrix of at most so many rows or columns is decomposed exactly
OVERSAMPLE, SWEEPS = 16, 12
NOTHING = 1e-9  # singular values below this share of the largest are rounding


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of a matrix product are split by threads, so that their last bits depend on how many there are."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def total(parts: Sequence[Part]) -> LowRank:
    """`sum_i w_i dW_i` exactly: all ranks in a row, float64; biases left out."""
    a = torch.cat([part.form.a.double() for part in parts])
    b = torch.cat([part.form.b.double() for part in parts], dim=1)
    return LowRank(a, b, torch.cat([part.weight * part.form.d.double() for part in parts]))


def balanced(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted delta as A [k, in] and B [out, k], float64: the factors of its singular form, roots on both sides.

    They depend on the delta alone, not on how its training shared it among factors and ranks; of each column of B the
    largest entry is positive.
    """
    singular = singular_form(total([part]))
    root = singular.s.sqrt()
    b = singular.u * root
    sign = b.gather(0, b.abs().argmax(dim=0, keepdim=True)).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    return (singular.v * root * sign).T, b * sign


def significant(s: torch.Tensor) -> int:
    """How many singular values [k], descending, are more than rounding; at least 1."""
    return max(1, int((s > NOTHING * s[:1]).sum()))


def best(singular: SingularForm, rank: int | None, dtype: torch.dtype) -> LowRank:
    """Its first `rank` components, or all that are more than rounding."""
    kept = significant(singular.s)
    return singular.balanced(kept if rank is None else min(rank, kept), dtype)


def of_core(left: torch.Tensor, core: torch.Tensor, right: torch.Tensor) -> SingularForm:
    """The singular form of `left @ core @ right^T`, where left [out, k] and right [in, l] have orthonormal columns."""
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return SingularForm(left @ u, s, right @ vh.T)


def of_dense(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> SingularForm:
    """The first `rank` singular triplets of a float32 matrix [out, in].

    Exact if a side is at most `EXACT`; else by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4) with
    `OVERSAMPLE` more columns, in float32.
    """
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return SingularForm(u[:, :rank], s[:rank], vh[:rank].T)
    columns = min(rank + OVERSAMPLE, *matrix.shape)
    found = matrix @ torch.randn(matrix.shape[1], columns, generator=generator)
    for _ in range(SWEEPS):
        found = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(found)[0])[0]
    left = torch.linalg.qr(found)[0]
    u, s, vh = torch.linalg.svd(left.T @ matrix, full_matrices=False)
    return SingularForm((left @ u)[:, :rank], s[:rank], vh[:rank].T)
