"""The singular form, its truncation and the norms against the dense matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.compression.singular import (
    distance,
    energy_rank,
    norm,
    relative,
    singular_form,
    truncation_error,
)
from adapters_store.forms import LowRank
from tests.adapters_store.compression.support import delta, deltas, dense


@given(deltas())
def test_the_singular_form_is_the_delta(form: LowRank) -> None:
    found, whole = singular_form(form), dense(form)
    size = float(whole.norm())
    assert torch.allclose(found.u @ found.s.diag() @ found.v.T, whole, rtol=0, atol=1e-12 * (1 + size))
    rank = min(form.rank, *whole.shape)
    assert found.s.shape == (rank,)
    assert bool((found.s.diff() <= 0).all())
    for side in (found.u, found.v):
        assert torch.allclose(side.T @ side, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    expected = torch.linalg.svdvals(whole)[:rank]
    assert torch.allclose(found.s, expected, rtol=1e-9, atol=1e-10 * (1 + size))


@given(deltas())
def test_balanced_factors_are_the_delta_with_equal_norms(form: LowRank) -> None:
    found = singular_form(form)
    balanced = found.balanced(len(found.s), torch.float64)
    assert torch.allclose(dense(balanced), dense(form), atol=1e-12 * (1 + norm(form)))
    assert torch.allclose(balanced.a.norm(dim=1), balanced.b.norm(dim=0))
    assert balanced.d.tolist() == [1.0] * balanced.rank


@given(deltas(), deltas())
def test_norm_and_distance_are_those_of_the_dense_matrices(one: LowRank, other: LowRank) -> None:
    assert norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-9, abs=1e-12)
    other = LowRank(other.a[:, :1].expand(-1, one.a.shape[1]), other.b[:1].expand(len(one.b), -1), other.d)
    expected = float((dense(one) - dense(other)).norm())
    assert distance(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-12 * (1 + norm(one) + norm(other)))
    assert distance(one, one) <= 1e-12 * (1 + norm(one))


@given(deltas(), st.floats(0.01, 1.0))
def test_truncation_keeps_the_energy_with_the_least_rank(form: LowRank, energy: float) -> None:
    found = singular_form(form)
    rank = energy_rank(found.s, energy)
    assert 1 <= rank <= len(found.s)
    error = truncation_error(found.s, rank)
    kept = found.balanced(rank, torch.float64)
    size = norm(form)
    assert relative(distance(form, kept), size) == pytest.approx(error, abs=1e-9)
    if size:
        assert error <= (1 - energy) ** 0.5 + 1e-7
        if rank > 1:
            assert truncation_error(found.s, rank - 1) > (1 - energy) ** 0.5 - 1e-7


def test_no_other_delta_of_the_rank_is_nearer() -> None:
    form = delta(6, 15, 11, seed=3)
    best = truncation_error(singular_form(form).s, 2) * norm(form)
    for seed in range(50):
        near = delta(2, 15, 11, seed=seed)
        fitted = dense(form) @ torch.linalg.pinv(near.a.double())  # the best B for these A
        assert distance(form, LowRank(near.a, fitted, torch.ones(2))) >= best


def test_nothing_lost_of_nothing() -> None:
    assert (relative(0.0, 0.0), relative(1.0, 0.0), relative(1.0, 4.0)) == (0.0, float("inf"), 0.25)
    assert (energy_rank(torch.zeros(3), 0.9), truncation_error(torch.zeros(3), 1)) == (1, 0.0)
