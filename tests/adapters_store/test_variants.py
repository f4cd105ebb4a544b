"""Variants of an adapter: their keys, and what a request's choice means."""

import itertools

import pytest

from adapters_store import variants
from adapters_store.errors import KnobRefused
from adapters_store.variants import WHOLE, Knobs, Variant

DIGEST = "a" * 64
KNOBS: Knobs = {"rank": {"max": 8}, "gate": {"default": 0.5}, "task": {"count": 4}}


def test_keys_and_variants_are_one_to_one() -> None:
    found = {}
    for rank, task, branch in itertools.product((None, 1, 4), (None, 0, 3), (None, 0, 1)):
        variant = Variant(rank, task, branch)
        key = variants.key_of(DIGEST, variant)
        assert variants.split(key) == (DIGEST, variant)
        found[key] = variant
    assert len(found) == 27
    assert found[DIGEST] == WHOLE
    assert found[f"{DIGEST}:rank=4"] == Variant(rank=4)


@pytest.mark.parametrize("told", ["", "rank", "rank=", "rank=x", "rank=04", "branch=0,rank=4", "rank=4,", "rank=None"])
def test_what_is_no_key_is_refused(told: str) -> None:
    with pytest.raises(ValueError, match=r"key|int"):
        variants.split(f"{DIGEST}:{told}")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [(WHOLE, 1.0)]),
        ({"rank": 8, "task": 0, "gate": 0.5}, [(WHOLE, 1.0)]),
        ({"rank": 3}, [(Variant(rank=3), 1.0)]),
        ({"rank": 1, "task": 3}, [(Variant(rank=1, task=3), 1.0)]),
        ({"gate": 0.25}, [(Variant(branch=0), 0.25), (Variant(branch=1), 0.75)]),
        ({"gate": 0.0, "rank": 2}, [(Variant(rank=2, branch=1), 1.0)]),
        ({"gate": 1.0}, [(Variant(branch=0), 1.0)]),
    ],
)
def test_what_a_choice_means(values: dict[str, float], expected: list[tuple[Variant, float]]) -> None:
    assert variants.chosen(KNOBS, values) == expected


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"rank": 9}, {"gate": -0.1}, {"gate": 1.01}, {"task": 4}, {"task": -1}]
)
def test_a_value_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(KnobRefused) as caught:
        variants.chosen(KNOBS, values)
    assert (caught.value.code, caught.value.param) == ("knob_out_of_range", next(iter(values)))


def test_what_is_no_knob_of_the_adapter_is_refused() -> None:
    with pytest.raises(KnobRefused, match=r"does not let requests choose `rank`\.$") as caught:
        variants.chosen({}, {"rank": 4})
    assert (caught.value.status, caught.value.code, caught.value.param) == (422, "knob_unsupported", "rank")
    with pytest.raises(KnobRefused, match="`gate`"):
        variants.chosen({"gate": {"default": 0.5}}, {"task": 1})


def test_an_adapter_has_the_variants_of_its_knobs() -> None:
    for variant in (WHOLE, Variant(rank=8), Variant(rank=1, task=3, branch=1)):
        variants.require(KNOBS, variant)
    for variant in (Variant(rank=9), Variant(task=4), Variant(branch=2)):
        with pytest.raises(KnobRefused):
            variants.require(KNOBS, variant)
    with pytest.raises(KnobRefused):
        variants.require({"rank": {"max": 8}}, Variant(branch=0))
    variants.require(variants.NO_KNOBS, WHOLE)
