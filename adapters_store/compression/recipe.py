"""A whole adapter compressed: rank truncation, then factors of fewer bits, with the error of each module."""

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch

from adapters_store.compression import int4, int8
from adapters_store.compression.singular import distance, energy_rank, norm, relative, singular_form
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, Delta, Form, LowRank

Dtype = Literal["native", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to compress.

    dtype: of the factors, `native` leaves the adapter's own; `int4` is int8 on an embedding, whose rows in the kernels
    are ranks, too few for groups; rank: the most that a module keeps; energy: the share of each module's squared
    Frobenius norm that its rank must keep, or None for all ranks.
    """

    dtype: Dtype = "int8"
    rank: int | None = None
    energy: float | None = None

    @property
    def method(self) -> str:
        truncated = self.rank is not None or self.energy is not None
        return "+".join([*(["truncate"] if truncated else []), *([] if self.dtype == "native" else [self.dtype])])

    @property
    def parameters(self) -> dict[str, Any]:
        return {key: value for key, value in (("rank", self.rank), ("energy", self.energy)) if value is not None}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a compressed adapter must keep. max_error: relative Frobenius error of all deltas together; max_divergence:
    mean KL divergence of its next-token distributions, in nats. None: no bound."""

    max_error: float | None = None
    max_divergence: float | None = None


@dataclass(frozen=True, slots=True)
class Compressed:
    """modules: forms by module; errors: relative Frobenius error of each low-rank delta, against the given weights;
    relative_error: that of all deltas together, sqrt(sum |dW' - dW|^2 / sum |dW|^2)."""

    modules: dict[str, tuple[Form, ...]]
    errors: dict[str, float]
    relative_error: float


def compress(weights: AdapterWeights, recipe: Recipe, embeddings: Set[str] = frozenset()) -> Compressed:
    """Every low-rank delta compressed; biases and all other forms stay as they are. embeddings: names of modules.

    Errors are those of the deltas as they are added, before whatever scales a module's output.

    Raises AdapterInvalid `already_compressed` (its error would be measured against what is no original) or
    `nothing_to_compress`, also where the ranks asked for cut nothing off. Takes about 1 ms per module of width 576 and
    rank 16.
    """
    check_compressible(weights)
    if not recipe.method:
        raise AdapterInvalid("Give `dtype`, `rank` or `energy`: nothing else compresses.", code="nothing_to_compress")
    modules: dict[str, tuple[Form, ...]] = {}
    errors: dict[str, float] = {}
    lost, whole = [0.0], [0.0]
    for name, forms in weights.modules.items():
        made: list[Form] = []
        for form in forms:
            if not isinstance(form, LowRank):
                made.append(form)
                continue
            smaller = _rounded(_truncated(form, recipe), recipe.dtype, name in embeddings)
            lost.append(distance(form, smaller.widened()))
            whole.append(norm(form))
            errors[name] = relative(lost[-1], whole[-1])
            made.append(smaller)
        modules[name] = tuple(made)
    if all(_same(made, weights.modules[name]) for name, made in modules.items()):
        text = "No module has more ranks than that, so the result would be the adapter itself. Ask for less."
        raise AdapterInvalid(text, code="nothing_to_compress")
    return Compressed(modules, errors, relative(math.hypot(*lost), math.hypot(*whole)))


def in_memory(weights: AdapterWeights, dtype: Dtype, embeddings: Set[str] = frozenset()) -> AdapterWeights:
    """The same adapter with factors of `dtype`; what is compressed already, and any other form, stays as it is."""
    if dtype == "native":
        return weights
    modules = {
        name: tuple(_rounded(form, dtype, name in embeddings) if _is_wide(form) else form for form in forms)
        for name, forms in weights.modules.items()
    }
    return replace(weights, modules=modules)


def already_compressed() -> AdapterInvalid:
    """The refusal of a second round, whose errors would be those of the last step alone."""
    text = "The adapter is compressed already. Compress the version that it was made of."
    return AdapterInvalid(text, code="already_compressed")


def check_compressible(weights: AdapterWeights) -> None:
    """Raises AdapterInvalid `already_compressed` or `nothing_to_compress` unless it has deltas, all as uploaded.

    And `feature_unsupported` for what a file of forms made here would lose: virtual tokens, an invocation.
    """
    if weights.context is not None or weights.invocation:
        text = "An adapter with virtual tokens or an invocation cannot be compressed."
        raise AdapterInvalid(text, code="feature_unsupported")
    found = [form for forms in weights.modules.values() for form in forms if isinstance(form, Delta)]
    if not all(_is_wide(form) for form in found):
        raise already_compressed()
    if not found:
        raise AdapterInvalid("The adapter has no low-rank deltas.", code="nothing_to_compress")


def _same(made: tuple[Form, ...], given: tuple[Form, ...]) -> bool:
    return all(one is other for one, other in zip(made, given, strict=True))


def _truncated(form: LowRank, recipe: Recipe) -> LowRank:
    if recipe.rank is None and recipe.energy is None:
        return form
    singular = singular_form(form)
    rank = len(singular.s) if recipe.rank is None else min(recipe.rank, len(singular.s))
    if recipe.energy is not None:
        rank = min(rank, energy_rank(singular.s, recipe.energy))
    if rank >= form.rank:
        return form
    wide = form.a.dtype if recipe.dtype == "native" else torch.float64
    return replace(singular.balanced(rank, wide), bias=form.bias)


def _rounded(form: LowRank, dtype: Dtype, is_embedding: bool) -> Delta:
    if dtype == "native":
        return form
    return int8.quantized(form)[0] if dtype == "int8" or is_embedding else int4.quantized(form)[0]


def _is_wide(form: Form) -> TypeGuard[LowRank]:
    return isinstance(form, LowRank) and form.a.dtype != torch.int8
