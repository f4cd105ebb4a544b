"""Joint compression against dense matrices: errors, exactness, monotony, and near what exact eigenvectors reach."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.compression import joint
from adapters_store.compression.joint import Deltas, JointBasis, Method, fit, join, stack
from adapters_store.forms import LowRank
from tests.adapters_store.compression.support import delta, dense

BOTH: list[Method] = ["full", "diag"]


def unrelated(count: int = 6, rank: int = 2, inputs: int = 14, outputs: int = 11) -> list[LowRank]:
    return [delta(rank, inputs, outputs, seed=seed) for seed in range(count)]


def related(count: int = 6, rank: int = 3, noise: float = 0.05) -> list[LowRank]:
    """The same input and output directions, mixed by each adapter in its own way."""
    shared, made = delta(rank, 14, 11, seed=99), []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(rank, rank, generator=generator)
        own = delta(rank, 14, 11, seed=seed)
        made.append(LowRank(shared.a + noise * own.a, shared.b @ mixing + noise * own.b, torch.ones(rank)))
    return made


def mean_error(forms: list[LowRank], basis: JointBasis) -> float:
    """Mean squared relative error, from dense matrices."""
    found = [(dense(form) - dense(basis.delta(i))).norm() / dense(form).norm() for i, form in enumerate(forms)]
    return float((torch.stack(found) ** 2).mean())


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_errors_are_the_dense_ones(method: Method, rank: int) -> None:
    forms = unrelated()
    basis = join(stack(forms), rank, method)
    assert basis.u.shape == (11, min(rank, 11))
    for index, form in enumerate(forms):
        error = float((dense(form) - dense(basis.delta(index))).norm() / dense(form).norm())
        assert float(basis.errors[index]) == pytest.approx(error, abs=1e-6)


def test_full_is_exact_with_the_ranks_of_all() -> None:
    forms = unrelated(count=4)
    basis = join(stack(forms), 8)
    assert float(basis.errors.max()) < 1e-3
    assert torch.allclose(basis.u.T @ basis.u, torch.eye(8, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(basis.v.T @ basis.v, torch.eye(8, dtype=torch.float64), atol=1e-10)


def test_full_of_one_adapter_is_its_truncation() -> None:
    form = delta(6, 14, 11, seed=5)
    singular = torch.linalg.svdvals(dense(form))
    best = float(singular[2:].norm() / singular.norm())
    assert float(join(stack([form]), 2).errors[0]) == pytest.approx(best, rel=0.01)


def test_diag_finds_what_is_diagonal() -> None:
    shared = delta(3, 14, 11, seed=1)
    forms = [LowRank(shared.a, shared.b, torch.tensor([1.0, 0.5 + i, 2.0 - i])) for i in range(5)]
    basis = join(stack(forms), 3, "diag")
    assert float(basis.errors.max()) < 0.05
    assert basis.cores.shape == (5, 3)


@pytest.mark.parametrize("method", BOTH)
def test_more_rank_and_more_kinship_mean_less_error(method: Method) -> None:
    apart, near = unrelated(), related()
    found = [mean_error(forms, join(stack(forms), rank, method)) for forms in (apart, near) for rank in (2, 6)]
    assert found[1] < found[0]
    assert found[3] < found[2]
    assert found[3] < found[1] / 4


def exact_sweeps(deltas: Deltas, rank: int, sweeps: int = 200) -> float:
    """JD-Full as the paper has it, whole eigendecompositions on dense matrices, best of several random starts."""
    matrices, best = deltas.b @ deltas.a, math.inf
    for seed in range(5):
        noise = torch.randn(matrices.shape[1], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        u = torch.linalg.qr(noise)[0]
        v = u
        for _ in range(sweeps):
            left = (matrices.mT @ u).permute(1, 0, 2).flatten(1)
            v = torch.linalg.eigh(left @ left.T)[1][:, -rank:]
            right = (matrices @ v).permute(1, 0, 2).flatten(1)
            u = torch.linalg.eigh(right @ right.T)[1][:, -rank:]
        best = min(best, float((fit(deltas, "full", u, v).errors ** 2).mean()))
    return best


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("kin", [True, False])
def test_full_is_as_good_as_exact_eigenvectors(rank: int, kin: bool) -> None:
    deltas = stack(related() if kin else unrelated())
    ours = float((join(deltas, rank).errors ** 2).mean())
    assert ours <= exact_sweeps(deltas, rank) * 1.05 + 1e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5), st.sampled_from(BOTH))
def test_no_sweep_raises_the_objective(seed: int, rank: int, count: int, method: Method) -> None:
    deltas = stack([delta(1 + (seed + i) % 4, 9, 7, seed=seed + i) for i in range(count)])
    u, v = joint._first(deltas, rank)
    sweep = joint._full_sweep if method == "full" else joint._diag_sweep
    found = fit(deltas, method, u, v)
    for _ in range(8):
        better = fit(deltas, method, *sweep(deltas, found))
        assert float((better.errors**2).mean()) <= float((found.errors**2).mean()) + 1e-7
        found = better


@pytest.mark.parametrize("method", BOTH)
def test_a_start_is_only_bettered(method: Method) -> None:
    deltas = stack(unrelated())
    first = join(deltas, 3, method)
    again = join(deltas, 3, method, start=first)
    assert float((again.errors**2).mean()) <= float((first.errors**2).mean()) + 1e-12


@pytest.mark.parametrize("method", BOTH)
def test_zero_and_repeated_adapters(method: Method) -> None:
    one = delta(2, 14, 11, seed=3)
    zero = LowRank(torch.zeros(1, 14), torch.zeros(11, 1), torch.ones(1))
    basis = join(stack([one, zero, one]), 2, method)
    assert float(basis.errors[1]) == 0.0
    assert float(dense(basis.delta(1)).abs().max()) == 0.0
    assert float(basis.errors[0]) == pytest.approx(float(basis.errors[2]), abs=1e-9)
    assert bool(basis.errors.isfinite().all())


@pytest.mark.parametrize("method", ["full", "diag"])
def test_bases_have_no_more_columns_than_all_deltas_have_ranks(method: Method) -> None:
    """A rank far above that is cut: further columns would cost bytes and change nothing."""
    stacked = stack([delta(2, 40, 50, seed=seed) for seed in (1, 2)])
    found = join(stacked, 30, method)
    assert found.u.shape == (50, 4)
    assert found.v.shape == (40, 4)
