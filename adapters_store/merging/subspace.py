"""Merges in subspaces that the sources share or are turned away from each other in; on factors, in float64.

A weight w_i scales its delta before anything else. Released code: apanariello4/core-space-merging.
"""

import torch

from adapters_store.compression.singular import SingularForm, singular_form
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.merging import algebra
from adapters_store.merging.corrected import Choice
from adapters_store.merging.operators import combine
from adapters_store.merging.parts import Stack


def core_space(stack: Stack, choice: Choice, rank: int | None) -> LowRank:
    """Core Space (arXiv 2509.17786): `M_i = U_B^T dW_i V_A`, merged by the operator, `dW = U_B M V_A^T`.

    V_A, U_B: bases of what all A, and all B, span, so that nothing is lost before the merge; rank: at most sum_i r_i.
    """
    pairs = [algebra.balanced(part) for part in stack.parts]
    left = _basis(torch.cat([b for _, b in pairs], dim=1))
    right = _basis(torch.cat([a for a, _ in pairs]).T)
    cores = [(left.T @ b) @ (a @ right) for a, b in pairs]
    core = _combined(stack, choice, cores)
    return _finished(stack, algebra.of_core(left, core, right), rank)


def knots(stack: Stack, choice: Choice, rank: int | None) -> LowRank:
    """KnOTS (arXiv 2410.19735): `[dW_1 | ... | dW_n] = U S [V_1 | ... | V_n]^T`, the V_i merged, `dW = U S V^T`.

    Components whose singular value is rounding are dropped; rank: at most sum_i r_i.
    """
    pairs = [algebra.balanced(part) for part in stack.parts]
    left, small = torch.linalg.qr(torch.cat([b for _, b in pairs], dim=1))
    sides, at = [], 0
    for a, _ in pairs:
        sides.append(small[:, at : at + len(a)] @ a)
        at += len(a)
    gram = torch.stack([side @ side.T for side in sides]).sum(dim=0)
    squares, turned = torch.linalg.eigh(gram)
    s, turned = squares.flip(0).clamp(min=0).sqrt(), turned.flip(1)
    kept = int((s > 1e-6 * s[0]).sum())  # the roots of rounding errors of the Gram matrix are larger than those
    s, turned = s[:kept], turned[:, :kept]
    if kept == 0:
        return _finished(stack, singular_form(algebra.total(stack.parts)), 1)
    shares = [(turned.T @ side) / s[:, None] for side in sides]
    merged = _combined(stack, choice, shares)
    right, core = torch.linalg.qr(merged.T)
    return _finished(stack, algebra.of_core(left @ turned, s[:, None] * core.T, right), rank)


def tsv(stack: Stack, rank: int | None) -> LowRank:
    """TSV-Merge (arXiv 2412.00081): the top singular triplets of each delta, their vectors turned orthogonal to the
    others' (Procrustes), put together with their own singular values.

    Each source keeps its share of `rank`, by default of the module's full rank, min(in, out), as in the paper.
    Raises AdapterInvalid `rank_too_low` for a rank below the number of sources.
    """
    count = len(stack.parts)
    if rank is not None and rank < count:
        text = f"`tsv` keeps at least one rank of each of the {count} sources. Raise `rank`."
        raise AdapterInvalid(text, code="rank_too_low", param="rank")
    found = [singular_form(algebra.total([part])) for part in stack.parts]
    full = min(len(found[0].u), len(found[0].v))
    share = max(1, min(rank or full, full) // count)
    left = torch.cat([each.u[:, :share] for each in found], dim=1)[:, :full]
    right = torch.cat([each.v[:, :share] for each in found], dim=1)[:, :full]
    s = torch.cat([each.s[:share] for each in found])[:full]
    core = _turned(left), _turned(right)
    root = s.sqrt()
    form = LowRank(((core[1] * root).T).to(stack.dtype), (core[0] * root).to(stack.dtype), torch.ones(len(s)))
    return LowRank(form.a, form.b, form.d, stack.bias)


def iso_c(stack: Stack, rank: int | None) -> LowRank:
    """Iso-C (arXiv 2502.04959): `sum_i w_i dW_i` with every singular value replaced by the mean of those that are kept.

    rank: how many are kept, by default all that are more than rounding.
    """
    singular = singular_form(algebra.total(stack.parts))
    kept = algebra.significant(singular.s)
    kept = kept if rank is None else min(kept, rank)
    s = singular.s[:kept].mean().expand(kept)
    return _finished(stack, SingularForm(singular.u[:, :kept], s, singular.v[:, :kept]), kept)


def _combined(stack: Stack, choice: Choice, tensors: list[torch.Tensor]) -> torch.Tensor:
    return combine(
        choice.operator,
        len(tensors),
        tensors.__getitem__,
        choice.density,
        choice.majority,
        lambda part: stack.generator(choice.seed, part),
    )


def _finished(stack: Stack, singular: SingularForm, rank: int | None) -> LowRank:
    form = algebra.best(singular, rank, stack.dtype)
    return LowRank(form.a, form.b, form.d, stack.bias)


def _basis(columns: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of [dimension, n], n at most dimension of them, but those of mere rounding."""
    left, small = torch.linalg.qr(columns)
    u, s, _ = torch.linalg.svd(small, full_matrices=False)
    basis: torch.Tensor = left @ u[:, : algebra.significant(s)]
    return basis


def _turned(columns: torch.Tensor) -> torch.Tensor:
    """The orthonormal columns nearest to these: P Q^T of their singular value decomposition P D Q^T."""
    left, small = torch.linalg.qr(columns)
    u, _, vh = torch.linalg.svd(small)
    turned: torch.Tensor = left @ (u @ vh)
    return turned
