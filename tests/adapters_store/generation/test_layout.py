"""The vector of an adapter: the same numbers back, in one order, and a refusal of what is not alike."""

import json

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import measure, normalise, restore
from tests.adapters_store.generation.support import adapter, near
from tests.adapters_store.support import NARROW, WIDTH


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back(rank: int, dtype: torch.dtype) -> None:
    modules = adapter(rank, rank, dtype)
    layout = Layout.of(modules)
    vector = layout.flatten(modules)
    assert vector.shape == (layout.numbers,) == (2 * rank * (2 * WIDTH + WIDTH + NARROW),)
    back = layout.split(vector)
    assert back.keys() == modules.keys()
    for name, form in back.items():
        assert form.a.dtype == form.b.dtype == dtype
        assert all(torch.equal(getattr(form, part), getattr(modules[name], part)) for part in ("a", "b", "d"))
    assert not torch.equal(layout.flatten(adapter(9, rank, dtype)), vector)


def test_the_order_is_that_of_the_layers_and_of_no_dict() -> None:
    form = LowRank(torch.ones(1, 2), torch.ones(3, 1), torch.ones(1))
    names = ["layers.2.v", "layers.10.q", "layers.2.q"]
    layout = Layout.of(dict.fromkeys(names, form))
    assert [module.name for module in layout.modules] == ["layers.2.q", "layers.2.v", "layers.10.q"]
    assert Layout.of(dict.fromkeys(reversed(names), form)) == layout


def test_a_scale_that_all_share_is_kept_and_any_other_goes_into_b() -> None:
    one, other = adapter(1, scale=2.0), adapter(2, scale=2.0)
    assert {module.scale for module in Layout.common([one, other]).modules} == {2.0}
    other = adapter(2, scale=0.5)
    layout = Layout.common([one, other])
    assert {module.scale for module in layout.modules} == {1.0}
    for modules in (one, other):
        for name, form in layout.split(layout.flatten(modules)).items():
            given = modules[name]
            assert torch.equal(form.a, given.a)
            assert torch.equal(form.b * form.d, given.b * given.d)
    gates = {name: LowRank(form.a, form.b, torch.tensor([1.0, 0.0])) for name, form in one.items()}
    layout = Layout.of(gates)
    assert all(
        torch.equal(form.b, gates[name].b * gates[name].d) for name, form in layout.split(layout.flatten(gates)).items()
    )
    with pytest.raises(AdapterInvalid, match="another scale"):
        Layout.of(one).flatten(other)


def test_a_bias_is_part_of_it() -> None:
    modules = {name: LowRank(form.a, form.b, form.d, torch.randn(len(form.b))) for name, form in adapter(1).items()}
    layout = Layout.of(modules)
    for name, form in layout.split(layout.flatten(modules)).items():
        assert form.bias is not None
        assert torch.equal(form.bias, modules[name].bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e6, -1e30, 65536.0])
def test_a_scale_that_is_large_is_part_of_b(scale: float) -> None:
    given = adapter(1, scale=scale)
    layout = Layout.of(given)
    assert {module.scale for module in layout.modules} == {scale if scale == 65536 else 1.0}
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    for name, form in layout.split(layout.flatten(given)).items():
        assert torch.allclose(form.b * form.d, given[name].b * scale, rtol=1e-6)


def test_json_there_and_back() -> None:
    layout = Layout.of(adapter(1, scale=1 / 3))
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 1 << 40},
        {"outputs": 2.0},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": 1e308},
        {"scale": -65537.0},
        {"scale": 1},
        {"name": 3},
        {"bias": 1},
        {"more": 1},
    ],
)
def test_json_of_strangers(change: dict[str, object]) -> None:
    told = Layout.of(adapter(1)).to_json()
    told["modules"][0] |= change
    with pytest.raises((ValueError, TypeError)):
        Layout.from_json(told)
    for other in ({"modules": [], "dtype": "F32"}, {"modules": told["modules"][1:] * 2, "dtype": "F32"}):
        with pytest.raises(ValueError, match="modules"):
            Layout.from_json(other)


def test_adapters_that_are_not_alike() -> None:
    one = adapter(1)
    first = next(iter(one))
    bias = LowRank(one[first].a, one[first].b, one[first].d, torch.zeros(WIDTH))
    for other, why in (
        ({name: form for name, form in one.items() if name != first}, "other modules"),
        (adapter(1, rank=3), "another rank"),
        ({**one, first: bias}, "a bias"),
        ({**one, first: LowRank(one[first].a, torch.randn(5, 2), one[first].d)}, "other shapes"),
        (adapter(1, dtype=torch.bfloat16), "several types"),
    ):
        with pytest.raises(AdapterInvalid, match=why) as caught:
            Layout.common([one, other])
        assert caught.value.code == "layouts_differ"
        if why != "several types":
            with pytest.raises(AdapterInvalid) as caught:
                Layout.of(one).flatten(other)
            assert caught.value.code == "layouts_differ"
    eight = {name: LowRank(form.a.to(torch.int8), form.b.to(torch.int8), form.d) for name, form in one.items()}
    for given, code in (([eight], "feature_unsupported"), ([], "too_few_samples"), ([{}], "too_few_samples")):
        with pytest.raises(AdapterInvalid) as caught:
            Layout.common(given)
        assert caught.value.code == code


def test_normalised_tensors_have_mean_0_and_deviation_1() -> None:
    modules = adapter(1)
    modules["model.layers.0.self_attn.v_proj"].a.fill_(0.25)  # all equal: no deviation
    layout = Layout.of(modules)
    vector = layout.flatten(modules)
    statistics = measure(vector, layout)
    parts = normalise(vector, statistics, layout).split(layout.counts())  # type: ignore[no-untyped-call]
    deviations = [float(part.std(correction=0)) for part in parts]
    assert all(abs(float(part.mean())) < 1e-6 for part in parts)
    assert sorted(deviations) == pytest.approx([0.0] + [1.0] * (len(parts) - 1), abs=1e-5)
    assert torch.allclose(restore(normalise(vector, statistics, layout), statistics, layout), vector, atol=1e-6)
    other = measure(layout.flatten(near(adapter(5), 1)), layout)
    assert not torch.allclose(restore(normalise(vector, statistics, layout), other, layout), vector, atol=0.01)
