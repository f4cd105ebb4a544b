"""Weights by trial: near what a loss wants, and the same every time."""

from collections.abc import Mapping

import torch

from adapters_store.forms import Form
from adapters_store.merging.search import BOUND, weight_search
from tests.adapters_store.merging.support import SPECS, exact, matrices, sources


def test_finds_the_weights_that_a_loss_was_made_of() -> None:
    given = sources((3, 5, 4), (1.0, 0.5, -0.75))
    wanted = exact(given)["wide"]
    calls = 0

    def loss(modules: Mapping[str, tuple[Form, ...]]) -> float:
        nonlocal calls
        calls += 1
        return float((matrices(modules)["wide"] - wanted).norm() / wanted.norm()) * 5

    found = weight_search(given, loss, SPECS, method="cat", iterations=150)
    assert calls == 150
    assert torch.allclose(torch.tensor(found.weights), torch.tensor([1.0, 0.5, -0.75]), atol=0.15)
    assert found.loss == loss(found.modules) < 0.6
    again = weight_search(given, loss, SPECS, method="cat", iterations=150)
    assert again.weights == found.weights
    assert weight_search(given, loss, SPECS, method="cat", iterations=150, seed=1).weights != found.weights
    swapped = weight_search([given[1], given[0], given[2]], loss, SPECS, method="cat", iterations=150)
    assert abs(swapped.weights[1] - 1.0) < 0.2


def test_a_loss_that_wants_nothing_gets_nothing_and_weights_are_bounded() -> None:
    given = sources()
    assert weight_search(given, lambda _: 0.0, SPECS, iterations=10).weights == (0.0, 0.0, 0.0)

    def larger(modules: Mapping[str, tuple[Form, ...]]) -> float:
        return -float(matrices(modules)["wide"].norm())

    found = weight_search(given, larger, SPECS, iterations=60)
    assert max(abs(weight) for weight in found.weights) == BOUND
