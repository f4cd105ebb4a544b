"""Against PEFT itself: every combination type, its oddities included, tensor for tensor."""

import inspect
import re
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraModel

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.merging.methods import merge
from adapters_store.merging.parts import Source
from tests.adapters_store.compression.support import delta, dense
from tests.adapters_store.merging.peft import SPECS, Adapter, Oracle, oracle

SAME = [Adapter(1.0, {"r": 4, "lora_alpha": 8}), Adapter(-0.7, {"r": 4, "lora_alpha": 6}), Adapter(0.5, {"r": 4})]
MIXED = [Adapter(0.9, {"r": 4, "lora_alpha": 8}), Adapter(-0.7, {"r": 6}), Adapter(0.4, {"r": 2, "use_rslora": True})]
RSLORA = [Adapter(0.9, {"r": 4, "lora_alpha": 8, "use_rslora": True}), *SAME[1:]]
PARTLY = [SAME[0], Adapter(0.6, {"r": 4, "target_modules": ["linear", "embed"]})]
DENSITY: dict[str, Any] = {"density": 0.4}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": DENSITY,
    "dare_linear": DENSITY,
    "dare_ties": DENSITY,
    "magnitude_prune": DENSITY,
    "ties_svd": DENSITY,
    "dare_linear_svd": DENSITY,
    "dare_ties_svd": DENSITY,
    "magnitude_prune_svd": DENSITY,
}


def ours(given: Oracle, method: str, parameters: dict[str, Any]) -> dict[str, LowRank]:
    made = merge(given.sources(), method, {"mode": "peft_exact", **parameters}, SPECS).modules
    return {name: form for name, (form,) in made.items() if isinstance(form, LowRank)}


def check(given: Oracle, method: str, parameters: dict[str, Any], options: dict[str, Any]) -> None:
    """To float32's last bits; PEFT's SVD is one of full matrices, another order of the same sums."""
    tolerance = 2e-5 if method.endswith("svd") else 3e-7
    found = ours(given, method, parameters)
    expected = given.merged(method, parameters.get("seed", 0), **options)
    assert found.keys() == expected.keys()
    for name, form in expected.items():
        for part in ("a", "b", "d"):
            one, other = getattr(found[name], part), getattr(form, part)
            assert one.shape == other.shape, (name, part)
            assert torch.allclose(one, other, rtol=0, atol=tolerance * float(other.abs().max())), (name, part)


def test_every_combination_type_is_there() -> None:
    text = str(inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"].annotation)
    assert set(re.findall(r"['\"](\w+)['\"]", text)) == set(COMBINATIONS)


@pytest.mark.parametrize(
    "adapters", [SAME, RSLORA, PARTLY, SAME[:1], SAME[1:2]], ids=["same", "rs", "partly", "1", "-1"]
)
@pytest.mark.parametrize("method", COMBINATIONS)
def test_equals_peft(method: str, adapters: list[Adapter]) -> None:
    options = COMBINATIONS[method]
    seed = {"seed": 3} if method.startswith("dare") else {}
    check(oracle(*adapters), method, {**options, **seed}, options)


@pytest.mark.parametrize("method", [name for name in COMBINATIONS if name.endswith("svd") or name == "cat"])
def test_equals_peft_for_different_ranks(method: str) -> None:
    options = COMBINATIONS[method]
    check(oracle(*MIXED), method, options, options)
    if method != "cat":
        check(oracle(*MIXED), method, {**options, "rank": 3}, {**options, "svd_rank": 3})
        check(oracle(*MIXED), method, {**options, "clamp": 0.9}, {**options, "svd_clamp": 0.9})


@pytest.mark.parametrize("method", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_equals_peft_by_frequency(method: str) -> None:
    options = {"density": 0.6, "majority_sign_method": "frequency"}
    check(oracle(*SAME), method, options, options)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear_svd"])
def test_equals_peft_where_nothing_is_pruned(method: str) -> None:
    with pytest.warns(UserWarning, match="no pruning"):
        check(oracle(*SAME), method, {"density": 1.0}, {"density": 1.0})


def test_patterns_of_ranks_fill_up_and_refuse_as_peft_does() -> None:
    adapters = [Adapter(1.0, {"r": 4, "rank_pattern": {"linear": 6}}), Adapter(0.5, {"r": 3})]
    check(oracle(*adapters), "cat", {}, {})
    check(oracle(*adapters), "svd", {}, {})
    with pytest.raises(ValueError, match="same r"):
        oracle(*adapters).merged("linear")
    with pytest.raises(AdapterInvalid) as caught:
        ours(oracle(*adapters), "linear", {})
    assert caught.value.code == "ranks_differ"


def test_the_scale_is_not_applied_twice_but_inherited() -> None:
    """Of the traps that methods.md tells of, the squared scale has gone in 0.21.2; rsLoRA's is there."""
    for adapters, scale in ((SAME, 1.0), (RSLORA, 12**0.5)):
        given = oracle(*adapters)
        exact = sum(
            each.weight * dense(form)
            for each in given.sources()
            for form in each.modules["linear"]
            if isinstance(form, LowRank)
        )
        found = dense(ours(given, "svd", {"rank": 12})["linear"])
        assert torch.allclose(found, scale * torch.as_tensor(exact), atol=1e-4)
        corrected = merge(given.sources(), "svd", {"rank": 12}, SPECS).modules["linear"][0]
        assert isinstance(corrected, LowRank)
        assert torch.allclose(dense(corrected), torch.as_tensor(exact), atol=1e-4)


def test_what_peft_cannot_do_is_refused() -> None:
    given = oracle(*SAME)
    with pytest.raises(AdapterInvalid) as caught:
        ours(given, "svd", {"rank": 25})
    assert caught.value.code == "rank_limit"
    form = delta(4, 24, 40)
    biased = Source({"linear": (LowRank(form.a, form.b, form.d, torch.ones(40)),)})
    with pytest.raises(AdapterInvalid, match="bias") as caught:
        merge([biased], "linear", {"mode": "peft_exact"}, SPECS)
    assert caught.value.code == "feature_unsupported"
    corrected = merge([biased, biased], "linear", {}, SPECS).modules["linear"][0]
    assert isinstance(corrected, LowRank)
    assert corrected.bias is not None
    assert torch.equal(corrected.bias, torch.full((40,), 2.0))
