"""Whole adapters: what is compressed, what stays, and the errors that are stated."""

import math
from collections.abc import Mapping

import pytest
import torch

from adapters_store.compression.recipe import Recipe, compress, in_memory
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, Delta, Int4LowRank, LowRank, ReplacedWeight
from tests.adapters_store.compression.support import delta, dense

HEAD = ReplacedWeight(torch.ones(3, 2))


def adapter(dtype: torch.dtype = torch.float32) -> AdapterWeights:
    forms = {f"layer.{rank}": delta(rank, 20, 16, seed=rank, dtype=dtype) for rank in (1, 4, 8)}
    return AdapterWeights("d" * 64, {**{name: (form,) for name, form in forms.items()}, "head": (HEAD,)})


def low_rank(modules: Mapping[str, tuple[object, ...]]) -> dict[str, LowRank]:
    return {name: form.widened() for name, (form,) in modules.items() if isinstance(form, Delta)}


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe("native", rank=3), Recipe("native", energy=0.8), Recipe(rank=5, energy=0.9), Recipe("int4")],
)
def test_the_errors_are_those_of_the_dense_matrices(recipe: Recipe) -> None:
    weights = adapter()
    found = compress(weights, recipe)
    before, after = low_rank(weights.modules), low_rank(found.modules)
    lost = {name: float((dense(before[name]) - dense(after[name])).norm()) for name in before}
    whole = {name: float(dense(before[name]).norm()) for name in before}
    assert found.errors == pytest.approx({name: lost[name] / whole[name] for name in lost}, rel=1e-6, abs=1e-9)
    total = math.hypot(*lost.values()) / math.hypot(*whole.values())
    assert found.relative_error == pytest.approx(total, rel=1e-6)
    assert found.modules["head"] == (HEAD,)


def test_dtypes_and_ranks() -> None:
    weights = adapter(torch.bfloat16)
    for recipe, dtype in ((Recipe(rank=3), torch.int8), (Recipe("native", rank=3), torch.bfloat16)):
        forms = low_rank(compress(weights, recipe).modules)
        assert {form.a.dtype for form in forms.values()} == {form.b.dtype for form in forms.values()} == {dtype}
        assert [form.rank for form in forms.values()] == [1, 3, 3]
    kept = low_rank(compress(weights, Recipe("native", rank=7)).modules)
    same = [name for name, form in kept.items() if form is weights.modules[name][0]]
    assert same == ["layer.1", "layer.4"]


@pytest.mark.parametrize("recipe", [Recipe("native", rank=8), Recipe("native", energy=1.0)])
def test_what_cuts_nothing_off_makes_no_adapter(recipe: Recipe) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        compress(adapter(), recipe)
    assert (caught.value.status, caught.value.code) == (422, "nothing_to_compress")
    assert compress(adapter(), Recipe("int8", recipe.rank, recipe.energy)).modules


def test_names_of_methods() -> None:
    assert [each.method for each in (Recipe(), Recipe("native", rank=2), Recipe("int4", energy=0.5))] == [
        "int8",
        "truncate",
        "truncate+int4",
    ]
    assert Recipe(rank=2, energy=0.5).parameters == {"rank": 2, "energy": 0.5}


def test_biases_stay() -> None:
    form, bias = delta(4, 9, 7), torch.arange(7.0)
    weights = AdapterWeights("d" * 64, {"a": (LowRank(form.a, form.b, form.d, bias),)})
    for recipe in (Recipe(), Recipe("native", rank=1), Recipe(rank=1)):
        assert low_rank(compress(weights, recipe).modules)["a"].bias is bias


def test_a_delta_of_zeros_has_no_error() -> None:
    zero = LowRank(torch.zeros(2, 3), torch.zeros(4, 2), torch.ones(2))
    found = compress(AdapterWeights("d" * 64, {"a": (zero,)}), Recipe(energy=0.9))
    assert (found.errors, found.relative_error) == ({"a": 0.0}, 0.0)


def test_what_is_refused() -> None:
    compressed = [AdapterWeights("d" * 64, compress(adapter(), Recipe(each)).modules) for each in ("int8", "int4")]
    for weights, recipe, code in (
        (compressed[0], Recipe("int4"), "already_compressed"),
        (compressed[1], Recipe(), "already_compressed"),
        (AdapterWeights("d" * 64, {"head": (HEAD,)}), Recipe(), "nothing_to_compress"),
        (adapter(), Recipe("native"), "nothing_to_compress"),
    ):
        with pytest.raises(AdapterInvalid) as caught:
            compress(weights, recipe)
        assert (caught.value.status, caught.value.code) == (422, code)


def test_in_memory() -> None:
    weights = adapter()
    assert in_memory(weights, "native") is weights
    small = in_memory(weights, "int8")
    assert small.digest == weights.digest
    assert {form.a.dtype for form in low_rank(small.modules).values()} == {torch.int8}
    assert small.modules["head"] == (HEAD,)
    for dtype in ("int8", "int4"):
        again = in_memory(small, dtype)
        assert all(again.modules[name][0] is small.modules[name][0] for name in again.modules)


def test_four_bits_leave_embeddings_in_eight() -> None:
    weights, embeddings = adapter(), frozenset({"layer.4"})
    for modules in (
        in_memory(weights, "int4", embeddings).modules,
        compress(weights, Recipe("int4"), embeddings).modules,
    ):
        assert modules["head"] == (HEAD,)
        for name in ("layer.1", "layer.8"):
            assert isinstance(modules[name][0], Int4LowRank)
        form = modules["layer.4"][0]
        assert isinstance(form, LowRank)
        assert form.a.dtype == torch.int8
