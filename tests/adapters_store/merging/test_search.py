"""Weights by trial: near what a loss wants, and the same every time."""

import math
from collections.abc import Callable

import pytest
import torch

from adapters_store.merging.methods import merge
from adapters_store.merging.search import BOUND, Found, WeightSearch
from tests.adapters_store.merging.support import SPECS, exact, matrices, sources


def searched(count: int, loss: Callable[[tuple[float, ...]], float], trials: int, seed: int = 0) -> Found:
    search = WeightSearch(count, seed)
    for _ in range(trials):
        search.tell(loss(search.ask()))
    return search.best


def test_finds_the_weights_that_a_loss_was_made_of() -> None:
    given = sources((3, 5, 4), (1.0, 0.5, -0.75))
    wanted = exact(given)["wide"]
    alone = [exact([type(each)(each.modules, 1.0)])["wide"] for each in given]

    def loss(weights: tuple[float, ...], order: tuple[int, ...] = (0, 1, 2)) -> float:
        made = sum(weight * alone[index] for weight, index in zip(weights, order, strict=True))
        return float((made - wanted).norm() / wanted.norm()) * 5

    found = searched(3, loss, 150)
    assert torch.allclose(torch.tensor(found.weights), torch.tensor([1.0, 0.5, -0.75]), atol=0.15)
    assert found.loss == loss(found.weights) < 0.6
    assert searched(3, loss, 150) == found
    assert searched(3, loss, 150, seed=1).weights != found.weights
    swapped = searched(3, lambda weights: loss(weights, (1, 0, 2)), 150)
    assert abs(swapped.weights[1] - 1.0) < 0.2


def test_a_loss_that_wants_nothing_gets_nothing_and_weights_are_bounded() -> None:
    assert searched(3, lambda _: 0.0, 10).weights == (0.0, 0.0, 0.0)
    found = searched(2, lambda weights: -abs(weights[0]) * 10, 60)
    assert abs(found.weights[0]) == BOUND


def test_numbers_that_are_none_are_passed_over() -> None:
    search = WeightSearch(2)
    with pytest.raises(ValueError, match="tried"):
        _ = search.best
    search.ask()
    search.tell(math.nan)
    search.ask()
    search.tell(1.0)
    assert search.best.loss == 1.0
    search.ask()
    search.tell(math.inf)
    assert search.best.loss == 1.0


def test_the_merge_itself_is_the_exact_sum_unless_a_rank_is_given() -> None:
    given = sources((3, 5, 4), (0.25, -1.0, 0.5))
    told = {"examples": [{"prompt": "p", "answer": "a"}]}
    merged = merge(given, "weight_search", told, SPECS).modules
    for name, wanted in exact(given).items():
        assert torch.allclose(matrices(merged)[name], wanted, atol=1e-5)
    small = merge(given, "weight_search", told | {"rank": 2}, SPECS).modules
    assert all(form.rank <= 2 for forms in small.values() for form in forms if hasattr(form, "rank"))
