"""PEFT's combinations without their traps: the result depends on the deltas and weights alone.

Scales and weights are folded in before anything else, ranks may differ, the result's own scale is 1, random numbers
come from a seed, and signs are elected among weighted entries.
"""

from dataclasses import dataclass

import torch

from adapters_store.compression.singular import singular_form
from adapters_store.forms import LowRank
from adapters_store.merging import algebra
from adapters_store.merging.operators import Majority, Operator, combine
from adapters_store.merging.parts import Stack


@dataclass(frozen=True, slots=True)
class Choice:
    """An element-wise merge. density: share of entries kept, 0 to 1; seed: of what is dropped at random."""

    operator: Operator
    density: float = 1.0
    majority: Majority = "total"
    seed: int = 0


def concatenated(stack: Stack) -> LowRank:
    """`sum_i w_i dW_i`, exactly: the factors as they are, the weights in `d`; rank sum_i r_i."""
    a = torch.cat([part.form.a.to(stack.dtype) for part in stack.parts])
    b = torch.cat([part.form.b.to(stack.dtype) for part in stack.parts], dim=1)
    return LowRank(a, b, torch.cat([part.weight * part.form.d for part in stack.parts]), stack.bias)


def summed(stack: Stack, rank: int | None) -> LowRank:
    """The delta of this rank (by default the largest of a source) that is nearest to `sum_i w_i dW_i`."""
    return _with_bias(stack, algebra.best(singular_form(algebra.total(stack.parts)), rank or stack.rank, stack.dtype))


def clamped(form: LowRank, share: float | None) -> LowRank:
    """Entries of B s and of V^T beyond this quantile of all of them cut off, as PEFT's `svd_clamp`; None: none."""
    if share is None:
        return form
    size = torch.linalg.vector_norm(form.a.double(), dim=1)
    a, b = form.a.double() / torch.where(size > 0, size, 1.0)[:, None], form.b.double() * size
    values = torch.cat([a.flatten(), b.flatten()])
    high = values.kthvalue(1 + round(share * (len(values) - 1))).values.abs()
    return LowRank(a.clamp(-high, high).to(form.a.dtype), b.clamp(-high, high).to(form.a.dtype), form.d, form.bias)


def of_factors(stack: Stack, choice: Choice) -> LowRank:
    """The operator on A and on B of each delta's singular form, its roots on both sides; no dense matrix.

    Those factors depend on the deltas alone, not on where a training happened to put its ranks. Lower ranks are filled
    up with zeros; the result has the largest rank of a source.
    """
    pairs = [algebra.balanced(part) for part in stack.parts]
    rank = max(len(a) for a, _ in pairs)
    a = [torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs]
    b = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs]
    made = [
        combine(
            choice.operator,
            len(pairs),
            side.__getitem__,
            choice.density,
            choice.majority,
            lambda part, offset=offset: stack.generator(choice.seed, 2 * part + offset),  # type: ignore[misc]
        )
        for offset, side in enumerate((a, b))
    ]
    return LowRank(made[0].to(stack.dtype), made[1].to(stack.dtype), torch.ones(rank), stack.bias)


def of_deltas(stack: Stack, choice: Choice, rank: int | None) -> LowRank:
    """The operator on the dense deltas, then the nearest delta of this rank (by default the largest of a source).

    Holds about six float32 matrices of the module's size, however many sources there are.
    """

    def dense(source: int) -> torch.Tensor:
        part = stack.parts[source]
        return (part.form.b.float() * (part.form.d * part.weight)) @ part.form.a.float()

    merged = combine(
        choice.operator,
        len(stack.parts),
        dense,
        choice.density,
        choice.majority,
        lambda part: stack.generator(choice.seed, part),
    )
    wanted = rank or stack.rank
    singular = algebra.of_dense(merged, wanted, stack.generator(choice.seed, len(stack.parts)))
    return _with_bias(stack, algebra.best(singular, wanted, stack.dtype))


def _with_bias(stack: Stack, form: LowRank) -> LowRank:
    return LowRank(form.a, form.b, form.d, stack.bias)
