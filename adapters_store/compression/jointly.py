"""A collection of adapters compressed together: each becomes a `SharedBasis`, with its own errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adapters_store.compression.clusters import Collection, compress_collection
from adapters_store.compression.joint import Method
from adapters_store.compression.recipe import Compressed, check_compressible
from adapters_store.compression.singular import distance, norm, relative
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, Form, LowRank, SharedBasis

JointMethod = Literal["jd_full", "jd_diag"]
BASIS_DTYPE = torch.bfloat16  # columns of norm 1: what rounding adds is a hundredth of what joint compression takes
_METHODS: Mapping[JointMethod, Method] = {"jd_full": "full", "jd_diag": "diag"}


@dataclass(frozen=True, slots=True)
class JointRecipe:
    """How to compress a collection. method: a full core or a diagonal one for each adapter; rank: of the bases, at
    most; clusters: how many bases a module has, at most, each shared by the adapters that it suits best."""

    method: JointMethod
    rank: int
    clusters: int = 1

    @property
    def parameters(self) -> dict[str, Any]:
        return {"rank": self.rank, "clusters": self.clusters}


@dataclass(frozen=True, slots=True)
class Member:
    """What an adapter of the collection has become, and which cluster's bases it shares."""

    made: Compressed
    cluster: int


def compress_jointly(adapters: Sequence[AdapterWeights], recipe: JointRecipe) -> list[Member]:
    """Every adapter's low-rank deltas in shared bases, in the adapters' order; biases and other forms stay.

    Raises AdapterInvalid `too_few_adapters` (fewer than clusters, or than two), `modules_differ`, and as `compress`
    `already_compressed` or `nothing_to_compress`. Holds all factors in float64 in memory.
    """
    if len(adapters) < max(recipe.clusters, 2):
        raise AdapterInvalid(
            f"{len(adapters)} adapters cannot share {recipe.clusters} bases; give at least {max(recipe.clusters, 2)}.",
            code="too_few_adapters",
            param="adapters",
        )
    for weights in adapters:
        check_compressible(weights)
    deltas = [_deltas(weights) for weights in adapters]
    collection = compress_collection(deltas, recipe.rank, recipe.clusters, _METHODS[recipe.method])
    shared = _shared(collection, len(adapters))
    _check_smaller(deltas, [bases for _, bases in shared])
    return [
        Member(_member(weights, own, bases), cluster)
        for weights, own, (cluster, bases) in zip(adapters, deltas, shared, strict=True)
    ]


def _deltas(weights: AdapterWeights) -> dict[str, LowRank]:
    return {name: form for name, forms in weights.modules.items() for form in forms if isinstance(form, LowRank)}


def _check_smaller(before: Sequence[Mapping[str, LowRank]], after: Sequence[Mapping[str, SharedBasis]]) -> None:
    forms = [form for each in after for form in each.values()]
    bases = {id(tensor): tensor.nbytes for form in forms for tensor in (form.u, form.v)}
    taken = sum(bases.values()) + sum(form.core.nbytes for form in forms)
    held = sum(form.a.nbytes + form.b.nbytes for each in before for form in each.values())
    if taken >= held:
        raise AdapterInvalid(
            f"Together the adapters would take {taken} bytes in these bases and take {held} now. Lower `rank` or "
            "`clusters`, or name more adapters.",
            code="nothing_to_compress",
            param="rank",
        )


def _shared(collection: Collection, count: int) -> list[tuple[int, dict[str, SharedBasis]]]:
    """Of each adapter its cluster and its forms; those of a cluster hold the very same tensors."""
    found: list[tuple[int, dict[str, SharedBasis]]] = [(0, {})] * count
    for cluster, (members, bases) in enumerate(zip(collection.members, collection.bases, strict=True)):
        rounded = {
            name: (basis.u.to(BASIS_DTYPE), basis.v.T.contiguous().to(BASIS_DTYPE)) for name, basis in bases.items()
        }
        for place, member in enumerate(members.tolist()):
            forms = {name: SharedBasis(*rounded[name], basis.cores[place].float()) for name, basis in bases.items()}
            found[member] = (cluster, forms)
    return found


def _member(weights: AdapterWeights, deltas: Mapping[str, LowRank], shared: Mapping[str, SharedBasis]) -> Compressed:
    """The errors are those of the forms as they are stored, rounding included."""
    modules: dict[str, tuple[Form, ...]] = {}
    for name, forms in weights.modules.items():
        modules[name] = tuple(
            SharedBasis(shared[name].u, shared[name].v, shared[name].core, form.bias)
            if isinstance(form, LowRank)
            else form
            for form in forms
        )
    lost = {name: distance(form, shared[name].widened()) for name, form in deltas.items()}
    whole = {name: norm(form) for name, form in deltas.items()}
    errors = {name: relative(lost[name], whole[name]) for name in deltas}
    return Compressed(modules, errors, relative(math.hypot(*lost.values()), math.hypot(*whole.values())))
