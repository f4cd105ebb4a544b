"""LoRA-LEGO: the ranks of several adapters, clustered module by module, each cluster one rank of the result.

Source: LoRA-LEGO (arXiv 2409.16167). A minimal semantic unit is one rank, a row of A and a column of B. Its scale is
ambiguous, (a, b) ~ (c a, b / c) ~ (-a, -b), so units are brought to one gauge first: every scale and the adapter's
weight folded in by its root, equal norms of a and b, the largest entry of b positive. Clusters are those of the
directions, [a / |a|, b / |b|]; a cluster's unit is the mean of its members.

All runs in float64 on the units' inner products [n, n], in a fixed order: equal input and seed give equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adapters_store.forms import LowRank
from adapters_store.merging.parts import Part, Stack

Norm = Literal["l2", "inf", "none"]


@dataclass(frozen=True, slots=True)
class Units:
    """n units in the gauge above, those of a source in a row, the largest first, so that their order says nothing.

    a: [n, in]; b: [n, out], float64; origin: of each its source and its rank there.
    """

    a: torch.Tensor
    b: torch.Tensor
    origin: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.origin)


@dataclass(frozen=True, slots=True)
class Clusters:
    """members: for each unit of the result its members, as (source, rank); inertia: the sum of the squared distances of
    all directions from the mean of their cluster."""

    members: tuple[tuple[tuple[int, int], ...], ...]
    inertia: float


def units(parts: Sequence[Part]) -> Units:
    """Every rank of every part. One of which a or b is zero does nothing, and is zero on both sides."""
    d = torch.cat([part.weight * part.form.d.double() for part in parts])
    a = torch.cat([part.form.a.double() for part in parts]) * (d.sign() * d.abs().sqrt())[:, None]
    b = torch.cat([part.form.b.double().T for part in parts]) * d.abs().sqrt()[:, None]
    a_norm, b_norm = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
    size = (a_norm * b_norm).sqrt()
    sign = b.gather(1, b.abs().argmax(dim=1, keepdim=True)).sign()
    a = a * _ratio(size, a_norm)[:, None] * sign
    b = b * _ratio(size, b_norm)[:, None] * sign
    order, start = [], 0
    for part in parts:
        own = size[start : start + part.form.rank].sort(descending=True, stable=True).indices
        order += [(start + rank, (part.source, rank)) for rank in own.tolist()]
        start += part.form.rank
    rows = [row for row, _ in order]
    return Units(a[rows], b[rows], tuple(origin for _, origin in order))


def merged(
    stack: Stack, rank: int | None, norm: Norm, output_reweighting: bool, starts: int, iterations: int, seed: int
) -> tuple[LowRank, Clusters]:
    """One module's merged delta of `rank` units, at most as many as there are; by default the largest rank of a source.

    norm: of a cluster's unit, which averaging shrinks, is raised to the mean of its members' (`inf`, as in the one
    public implementation, or `l2`; `none` leaves it). output_reweighting: times sqrt(r / k), r the largest rank of a
    source and k that of the result, against the growth of the output with the rank. starts, iterations: of k-means.

    With as many units as there are, and without output reweighting, the result is the concatenation; of one adapter
    with fewer, a pruning of its ranks.
    """
    found = units(stack.parts)
    k = min(rank or stack.rank, len(found))
    labels, inertia = cluster(found, k, starts, iterations, stack.generator(seed))
    members = torch.nn.functional.one_hot(labels, k).double()
    share = members / members.sum(dim=0)
    a, b = share.T @ found.a, share.T @ found.b
    if norm != "none":
        factor = _ratio(share.T @ _norms(found.a, found.b, norm), _norms(a, b, norm))[:, None]
        a, b = a * factor, b * factor
    scale = (stack.rank / k) ** 0.5 if output_reweighting else 1.0
    form = LowRank(a.to(stack.dtype), b.T.contiguous().to(stack.dtype), torch.full((k,), scale), stack.bias)
    groups = [tuple(found.origin[unit] for unit in (labels == each).nonzero().flatten().tolist()) for each in range(k)]
    return form, Clusters(tuple(groups), inertia)


def cluster(
    found: Units, k: int, starts: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Clusters 0 to k - 1 of the units' directions, none empty, and their inertia: the best of several starts.

    Source: k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's rounds until nothing moves.
    """
    if k == len(found):
        return torch.arange(k), 0.0
    gram = _cosines(found.a) + _cosines(found.b)
    best: tuple[torch.Tensor, float] | None = None
    for _ in range(starts):
        centres = _spread(gram, k, generator)
        labels = _distances(gram, torch.nn.functional.one_hot(centres, len(gram)).double().T).argmin(dim=1)
        labels, inertia = _lloyd(gram, labels, k, iterations)
        if best is None or inertia < best[1]:
            best = labels, inertia
    assert best is not None  # there is at least one start
    return best


def _lloyd(gram: torch.Tensor, labels: torch.Tensor, k: int, iterations: int) -> tuple[torch.Tensor, float]:
    for _ in range(iterations):
        labels = _filled(gram, labels, k)
        moved = _distances(gram, _shares(labels, k)).argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    labels = _filled(gram, labels, k)
    own = _distances(gram, _shares(labels, k)).gather(1, labels[:, None])
    return labels, float(own.clamp(min=0).sum())


def _filled(gram: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """The same clusters, each empty one given the unit that is farthest from the mean of its own, shared cluster."""
    sizes = torch.bincount(labels, minlength=k)
    labels = labels.clone()
    for empty in (sizes == 0).nonzero().flatten().tolist():
        sizes = torch.bincount(labels, minlength=k)
        shares = torch.nn.functional.one_hot(labels, k).double() / sizes.clamp(min=1)
        own = _distances(gram, shares).gather(1, labels[:, None]).flatten()
        labels[torch.where(sizes[labels] > 1, own, -1.0).argmax()] = empty
    return labels


def _spread(gram: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """k different units: the first at random, each other one with a chance that is its squared distance from them."""
    chosen = [int(torch.randint(len(gram), (1,), generator=generator))]
    for _ in range(k - 1):
        nearest = _distances(gram, torch.eye(len(gram), dtype=torch.float64)[:, chosen]).amin(dim=1).clamp(min=0)
        nearest[chosen] = 0
        if not nearest.any():  # the others are copies of these
            nearest = torch.ones_like(nearest)
            nearest[chosen] = 0
        reached = nearest.cumsum(0)
        point = reached[-1] * torch.rand(1, generator=generator, dtype=torch.float64)
        chosen.append(min(int(torch.searchsorted(reached, point, right=True)), int(nearest.nonzero()[-1])))
    return torch.tensor(chosen)


def _distances(gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Squared distances [n, k] from the mixtures of units that the columns of shares [n, k] are."""
    mixed = gram @ shares
    return gram.diagonal()[:, None] - 2 * mixed + (shares * mixed).sum(dim=0)


def _shares(labels: torch.Tensor, k: int) -> torch.Tensor:
    members = torch.nn.functional.one_hot(labels, k).double()
    return members / members.sum(dim=0)


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    size = torch.linalg.vector_norm(rows, dim=1)
    directions = rows / torch.where(size > 0, size, 1.0)[:, None]
    return directions @ directions.T


def _norms(a: torch.Tensor, b: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of each unit as one vector [a, b]; [n]."""
    if norm == "inf":
        return torch.maximum(a.abs().amax(dim=1), b.abs().amax(dim=1))
    return torch.hypot(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1))


def _ratio(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """value / by, 0 where by is 0."""
    return torch.where(by > 0, value / torch.where(by > 0, by, 1.0), 0.0)
