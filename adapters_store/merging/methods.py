"""Every merge method by name, and the one function that merges."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import Form, LowRank, ModuleSpec
from adapters_store.merging import algebra, corrected, lego, parameters, peft_exact, subspace
from adapters_store.merging.corrected import Choice
from adapters_store.merging.operators import Majority, Operator
from adapters_store.merging.parts import Part, Source, Stack, low_rank
from adapters_store.merging.peft_exact import Combination

Progress = Callable[[float], None]
Made = LowRank | tuple[LowRank, lego.Clusters]
Pruned = parameters.Pruned | parameters.Ties | parameters.Dropped | parameters.DareTies


@dataclass(frozen=True, slots=True)
class Method:
    """parameters: what it knows; module: makes one module's delta; dense: in which mode it holds dense matrices of a
    module."""

    parameters: type[parameters.Parameters]
    module: Callable[[Stack, Any], Made]
    dense: Literal["never", "peft_exact", "always"] = "never"


@dataclass(frozen=True, slots=True)
class Merged:
    """modules: a LowRank each, in the order of their names; clusters: of `lego`, by module."""

    modules: dict[str, tuple[Form, ...]]
    clusters: dict[str, lego.Clusters]


def merge(
    sources: Sequence[Source],
    method: str,
    given: Mapping[str, Any],
    specs: Mapping[str, ModuleSpec],
    progress: Progress = lambda done: None,
    max_rank: int | None = None,
) -> Merged:
    """One adapter of several, module by module; a module that only some sources change is merged of those.

    given: the method's parameters; specs: the base's modules; progress: is told the share that is done; max_rank:
    of the result, above which AdapterInvalid `rank_limit` is raised. Equal input gives equal bits, on any number of
    threads. Memory: the sources as they are, the result, and one module in float64.
    Raises AdapterInvalid: `unknown_method`, `unknown_parameter`, `bad_parameter`, `feature_unsupported` for a source
    that is no low-rank delta, `no_sources`, and what the method says.
    """
    chosen = find(method)
    told = parameters.parse(chosen.parameters, method, given)
    if not sources:
        raise AdapterInvalid("Name at least one adapter to merge.", code="no_sources", param="sources")
    if not all(math.isfinite(source.weight) for source in sources):
        raise AdapterInvalid("A weight must be a finite number.", code="bad_parameter", param="sources")
    names = sorted({name for source in sources for name in source.modules})
    exact = getattr(told, "mode", None) == "peft_exact"
    ranks = tuple(_largest(source) for source in sources) if exact else ()
    merged = Merged({}, {})
    with algebra.one_thread():
        for done, stack in enumerate(_stacks(sources, names, specs, ranks), start=1):
            made = _made(chosen, stack, told)
            if not isinstance(made, LowRank):
                made, merged.clusters[stack.name] = made
            _check(stack.name, made, max_rank)
            merged.modules[stack.name] = (made,)
            progress(done / len(names))
    return merged


def _made(chosen: Method, stack: Stack, told: Any) -> Made:
    try:
        return chosen.module(stack, told)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # what a decomposition says of infinities
        text = f"The merged numbers of `{stack.name}` are too large to be decomposed. Lower the weights."
        raise AdapterInvalid(text, code="nonfinite_weights", param="sources") from None


def find(method: str) -> Method:
    """Raises AdapterInvalid `unknown_method`."""
    if method not in METHODS:
        text = f"There is no merge method `{method[:64]}`; there are {', '.join(METHODS)}."
        raise AdapterInvalid(text, code="unknown_method", param="method")
    return METHODS[method]


def _stacks(
    sources: Sequence[Source], names: Sequence[str], specs: Mapping[str, ModuleSpec], ranks: tuple[int, ...]
) -> Iterator[Stack]:
    for name in names:
        parts = tuple(
            Part(index, low_rank(name, source.modules[name]), source.weight)
            for index, source in enumerate(sources)
            if name in source.modules
        )
        yield Stack(name, specs[name], parts, ranks, sources[0].rslora)


def _check(name: str, form: LowRank, max_rank: int | None) -> None:
    if max_rank is not None and form.rank > max_rank:
        text = f"Merged, `{name}` has the rank {form.rank}, above the server's limit of {max_rank} (`--max-rank`)."
        raise AdapterInvalid(
            f"{text} Lower `rank`, or take a method that keeps fewer.", code="rank_limit", param="rank"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in (form.a, form.b, form.d)):
        text = f"The merged factors of `{name}` are too large for their type. Lower the weights."
        raise AdapterInvalid(text, code="nonfinite_weights", param="sources")


def _largest(source: Source) -> int:
    return max((low_rank(name, source.modules[name]).rank for name in source.modules), default=0)


def _lego(stack: Stack, told: parameters.Lego) -> Made:
    return lego.merged(stack, told.rank, told.norm, told.output_reweighting, told.starts, told.iterations, told.seed)


def _cat(stack: Stack, told: parameters.Cat) -> Made:
    if told.mode == "peft_exact":
        return peft_exact.merged(stack, Combination("cat"), stack.generator(0))
    return corrected.concatenated(stack)


def _linear(stack: Stack, told: parameters.Linear) -> Made:
    if told.mode == "peft_exact":
        return peft_exact.merged(stack, Combination("linear"), stack.generator(0))
    return corrected.summed(stack, told.rank)


def _svd(stack: Stack, told: parameters.Svd) -> Made:
    if told.mode == "peft_exact":
        return peft_exact.merged(stack, Combination("svd", told.rank, told.clamp), stack.generator(0))
    return corrected.clamped(corrected.summed(stack, told.rank), told.clamp)


def _task_arithmetic(stack: Stack, told: parameters.TaskArithmetic | parameters.WeightSearch) -> Made:
    return corrected.concatenated(stack) if told.rank is None else corrected.summed(stack, told.rank)


def _choice(operator: Operator, told: Pruned | parameters.Subspace) -> Choice:
    majority: Majority = getattr(told, "majority_sign_method", "total")
    return Choice(operator, told.density, majority, getattr(told, "seed", 0))


def _of_factors(operator: Operator) -> Callable[[Stack, Pruned], Made]:
    def module(stack: Stack, told: Pruned) -> Made:
        choice = _choice(operator, told)
        if told.mode == "corrected":
            return corrected.of_factors(stack, choice)
        exact = Combination(operator, density=choice.density, majority=choice.majority)
        return peft_exact.merged(stack, exact, stack.generator(choice.seed))

    return module


def _of_deltas(operator: Operator) -> Callable[[Stack, parameters.PrunedSvd], Made]:
    def module(stack: Stack, told: parameters.PrunedSvd) -> Made:
        choice = _choice(operator, told)
        if told.mode == "corrected":
            return corrected.of_deltas(stack, choice, told.rank)
        exact = Combination(f"{operator}_svd", told.rank, told.clamp, choice.density, choice.majority)
        return peft_exact.merged(stack, exact, stack.generator(choice.seed))

    return module


def _knots(stack: Stack, told: parameters.Subspace) -> Made:
    return subspace.knots(stack, _choice(told.operator, told), told.rank)


def _core_space(stack: Stack, told: parameters.Subspace) -> Made:
    return subspace.core_space(stack, _choice(told.operator, told), told.rank)


def _tsv(stack: Stack, told: parameters.Truncated) -> Made:
    return subspace.tsv(stack, told.rank)


def _iso_c(stack: Stack, told: parameters.Truncated) -> Made:
    return subspace.iso_c(stack, told.rank)


METHODS: Mapping[str, Method] = {
    "lego": Method(parameters.Lego, _lego),
    "linear": Method(parameters.Linear, _linear),
    "cat": Method(parameters.Cat, _cat),
    "svd": Method(parameters.Svd, _svd, "peft_exact"),
    "task_arithmetic": Method(parameters.TaskArithmetic, _task_arithmetic),
    "ties": Method(parameters.Ties, _of_factors("ties")),
    "dare_linear": Method(parameters.Dropped, _of_factors("dare_linear")),
    "dare_ties": Method(parameters.DareTies, _of_factors("dare_ties")),
    "magnitude_prune": Method(parameters.Pruned, _of_factors("magnitude_prune")),
    "ties_svd": Method(parameters.TiesSvd, _of_deltas("ties"), "always"),
    "dare_linear_svd": Method(parameters.DroppedSvd, _of_deltas("dare_linear"), "always"),
    "dare_ties_svd": Method(parameters.DareTiesSvd, _of_deltas("dare_ties"), "always"),
    "magnitude_prune_svd": Method(parameters.PrunedSvd, _of_deltas("magnitude_prune"), "always"),
    "knots": Method(parameters.Subspace, _knots),
    "tsv": Method(parameters.Truncated, _tsv),
    "core_space": Method(parameters.Subspace, _core_space),
    "iso_c": Method(parameters.Truncated, _iso_c),
    # Whoever merges has had the sources' weights found before (`search.WeightSearch`): that needs a model.
    "weight_search": Method(parameters.WeightSearch, _task_arithmetic),
}
