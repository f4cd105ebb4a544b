"""A collection of adapters in several shared bases, each adapter in the basis that loses the least of it.

Source: Compress then Serve (arXiv 2407.00066), clustering: one basis for all; k-means on the cores S_i; then, by turns,
a basis per cluster and each adapter to the basis of least error. An adapter's cluster is the same in all modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters_store.compression.joint import Deltas, JointBasis, Method, fit, join, stack
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank

ROUNDS = 20
KMEANS_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Collection:
    """members: for each cluster the indices of its adapters; bases: for each cluster a basis per module, whose cores
    are in the order of the members; errors: [n], relative Frobenius error of each adapter over all its modules."""

    members: tuple[torch.Tensor, ...]
    bases: tuple[dict[str, JointBasis], ...]
    errors: torch.Tensor


def compress_collection(
    adapters: Sequence[Mapping[str, LowRank]], rank: int, clusters: int = 1, method: Method = "full"
) -> Collection:
    """Jointly compressed adapters, in at most `clusters` bases of at most `rank` columns per module.

    Raises AdapterInvalid `modules_differ` unless all adapters have the same modules. The mean squared relative error,
    each module scaled to norm 1, falls with every round; empty clusters are left out.
    """
    modules = _stacked(adapters)
    assigned = torch.zeros(len(adapters), dtype=torch.int64)
    bases = [_joined(modules, assigned, 0, rank, method, None)]
    if clusters > 1:
        assigned = _kmeans(_features(bases[0]), min(clusters, len(adapters)))
        bases = [_joined(modules, assigned, c, rank, method, None) for c in range(int(assigned.max()) + 1)]
    for _ in range(ROUNDS if clusters > 1 else 0):
        moved = torch.stack([_losses(modules, basis, method) for basis in bases]).argmin(dim=0)
        if torch.equal(moved, assigned):
            break
        kept = sorted(set(moved.tolist()))
        assigned = torch.tensor([kept.index(c) for c in moved.tolist()])
        bases = [_joined(modules, assigned, at, rank, method, bases[c]) for at, c in enumerate(kept)]
    return _collected(modules, assigned, bases)


def _stacked(adapters: Sequence[Mapping[str, LowRank]]) -> dict[str, Deltas]:
    if any(adapter.keys() != adapters[0].keys() for adapter in adapters):
        raise AdapterInvalid("Adapters of one shared basis must change the same modules.", code="modules_differ")
    return {name: stack([adapter[name] for adapter in adapters]) for name in adapters[0]}


def _joined(
    modules: Mapping[str, Deltas],
    assigned: torch.Tensor,
    cluster: int,
    rank: int,
    method: Method,
    start: Mapping[str, JointBasis] | None,
) -> dict[str, JointBasis]:
    members = (assigned == cluster).nonzero().flatten()
    return {
        name: join(deltas.chosen(members), rank, method, None if start is None else start[name])
        for name, deltas in modules.items()
    }


def _losses(modules: Mapping[str, Deltas], basis: Mapping[str, JointBasis], method: Method) -> torch.Tensor:
    """What each adapter would lose in these bases: the sum of its modules' squared relative errors; [n]."""
    found = [fit(deltas, method, basis[name].u, basis[name].v).errors ** 2 for name, deltas in modules.items()]
    return torch.stack(found).sum(dim=0)


def _collected(
    modules: Mapping[str, Deltas], assigned: torch.Tensor, bases: Sequence[dict[str, JointBasis]]
) -> Collection:
    members = tuple((assigned == cluster).nonzero().flatten() for cluster in range(len(bases)))
    lost, whole = torch.zeros(len(assigned), dtype=torch.float64), torch.zeros(len(assigned), dtype=torch.float64)
    for name, deltas in modules.items():
        whole += deltas.norms**2
        for own, basis in zip(members, bases, strict=True):
            lost[own] += (basis[name].errors * deltas.norms[own]) ** 2
    return Collection(members, tuple(bases), (lost / torch.where(whole > 0, whole, 1.0)).sqrt())


def _features(basis: Mapping[str, JointBasis]) -> torch.Tensor:
    """The cores of each adapter as one vector of norm 1: raw ones would sort adapters by their size; [n, numbers]."""
    flat = torch.cat([each.cores.flatten(1) for each in basis.values()], dim=1)
    size = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / torch.where(size > 0, size, 1.0)


def _kmeans(points: torch.Tensor, clusters: int) -> torch.Tensor:
    """Clusters 0, 1, ... of points [n, numbers], none of them empty: Lloyd's rounds from centres far apart."""
    centres = points[:1]
    for _ in range(clusters - 1):
        farthest = torch.cdist(points, centres).amin(dim=1).argmax()
        centres = torch.cat([centres, points[farthest, None]])
    assigned = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(KMEANS_ROUNDS):
        kept = sorted(set(assigned.tolist()))
        centres = torch.stack([points[assigned == cluster].mean(dim=0) for cluster in kept])
        moved = torch.cdist(points, centres).argmin(dim=1)
        if torch.equal(moved, assigned):
            break
        assigned = moved
    kept = sorted(set(assigned.tolist()))
    return torch.tensor([kept.index(cluster) for cluster in assigned.tolist()])
