"""LoRA-LEGO: what clustering ranks must keep, whatever the scale that a training gave each factor."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters_store.forms import LowRank
from adapters_store.merging.lego import units
from adapters_store.merging.methods import merge
from adapters_store.merging.parts import Part, Source
from tests.adapters_store.compression.support import delta, dense
from tests.adapters_store.merging.support import SPECS, close, exact, matrices, merged, source, sources

PLAIN: dict[str, Any] = {"output_reweighting": False}


@pytest.mark.parametrize("norm", ["l2", "inf", "none"])
def test_as_many_units_as_there_are_is_the_exact_sum(norm: str) -> None:
    given = sources()
    assert close(merged(given, "lego", rank=12, norm=norm, **PLAIN), exact(given))
    assert close(merged(given, "lego", rank=99, norm=norm, **PLAIN), merged(given, "cat"))
    assert not close(merged(given, "lego", rank=11, norm=norm, **PLAIN), exact(given))


@pytest.mark.parametrize("rank", [None, 5])
def test_one_adapter_with_all_its_ranks_is_itself(rank: int | None) -> None:
    given = [source(5, 7)]
    assert close(merged(given, "lego", rank=rank), exact(given))


def test_a_pruned_adapter_has_fewer_ranks_and_is_near() -> None:
    """Ten ranks in five pairs of almost equal directions: five units say it all."""
    form = delta(5, 24, 40, seed=3)
    noise = delta(5, 24, 40, seed=4)
    twice = LowRank(
        torch.cat([form.a, form.a + 0.01 * noise.a]),
        torch.cat([form.b, form.b + 0.01 * noise.b], dim=1),
        torch.ones(10),
    )
    made = merge([Source({"wide": (twice,)})], "lego", {"rank": 5, "norm": "l2", **PLAIN}, SPECS)
    (found,) = made.modules["wide"]
    assert isinstance(found, LowRank)
    assert found.rank == 5
    members = [{rank for _, rank in unit} for unit in made.clusters["wide"].members]
    assert sorted(map(sorted, members)) == [[rank, rank + 5] for rank in range(5)]
    direction = (dense(found) * dense(twice)).sum() / dense(found).norm() / dense(twice).norm()
    assert direction > 0.999


def test_the_report_names_every_unit_once() -> None:
    made = merge(sources(), "lego", {"rank": 4}, SPECS)
    for name, clusters in made.clusters.items():
        flat = [unit for members in clusters.members for unit in members]
        assert sorted(flat) == [(each, rank) for each, count in enumerate((3, 5, 4)) for rank in range(count)]
        assert len(clusters.members) == 4
        assert all(clusters.members), name
        assert clusters.inertia > 0
    whole = merge(sources(), "lego", {"rank": 12}, SPECS).clusters["wide"]
    assert (whole.inertia, {len(members) for members in whole.members}) == (0.0, {1})


def gauged(form: LowRank, seed: int) -> LowRank:
    """The same delta: ranks in another order, each (a, b) as (c a, b / c), signs and parts of d moved about."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(form.rank, generator=generator)
    c = torch.exp(torch.randn(form.rank, generator=generator)) * (2.0 * torch.randint(2, (form.rank,)) - 1)
    moved = torch.rand(form.rank, generator=generator) + 0.5
    a, b, d = form.a * c[:, None], form.b / c * moved, form.d / moved
    return LowRank(a[order], b[:, order], d[order])


def test_the_gauge_does_not_matter() -> None:
    given = sources()
    turned = []
    for at, each in enumerate(given):
        modules = {name: (gauged(form, at),) for name, (form,) in each.modules.items() if isinstance(form, LowRank)}
        turned.append(replace(each, modules=modules))
    assert close(matrices(turned[0].modules), matrices(given[0].modules))
    for norm in ("l2", "inf"):
        parameters = {"rank": 6, "norm": norm, "starts": 32}
        assert close(merged(turned, "lego", **parameters), merged(given, "lego", **parameters), 1e-4)


def test_units_are_balanced_and_mean_the_delta() -> None:
    form = delta(6, 24, 40, seed=1)
    found = units([Part(0, form, -0.5)])
    assert torch.allclose(found.b.T @ found.a, -0.5 * dense(form))
    assert torch.allclose(found.a.norm(dim=1), found.b.norm(dim=1))
    assert (found.b.gather(1, found.b.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_ranks_that_do_nothing_do_no_harm() -> None:
    form = delta(4, 24, 40, seed=1)
    form.b[:, 2] = 0
    form.d[3] = 0
    for rank in (1, 3, 4):
        made = merged([Source({"wide": (form,)})], "lego", rank=rank)["wide"]
        assert made.isfinite().all()
    zero = LowRank(form.a, torch.zeros_like(form.b), form.d)
    assert not merged([Source({"wide": (zero,)})] * 2, "lego", rank=3)["wide"].any()


@pytest.mark.parametrize("norm", ["l2", "inf"])
def test_parameter_reweighting_restores_the_mean_norm(norm: str) -> None:
    """One cluster of all units, by hand."""
    given = sources()
    made = merge(given, "lego", {"rank": 1, "norm": norm, **PLAIN}, SPECS).modules["wide"][0]
    assert isinstance(made, LowRank)
    parts = [Part(0, form, each.weight) for each in given for form in each.modules["wide"] if isinstance(form, LowRank)]
    found = units(parts)
    raw = torch.cat([found.a, found.b], dim=1)
    mean = raw.mean(dim=0)
    order = 2 if norm == "l2" else torch.inf
    mean = mean * torch.linalg.vector_norm(raw, ord=order, dim=1).mean() / torch.linalg.vector_norm(mean, ord=order)
    expected = torch.outer(mean[24:], mean[:24])
    assert torch.allclose(dense(made), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    plain = merged(given, "lego", rank=1, norm="none", **PLAIN)["wide"]
    assert dense(made).norm() > 2 * plain.norm()


def test_output_reweighting_is_the_root_of_the_ranks() -> None:
    given = sources()
    for rank in (2, 5, 8):
        scaled = merged(given, "lego", rank=rank)
        plain = merged(given, "lego", rank=rank, **PLAIN)
        assert close(scaled, {name: matrix * (5 / rank) ** 0.5 for name, matrix in plain.items()})


def test_modules_of_some_sources_only() -> None:
    given = [source(3, 0, names=("wide",)), source(5, 1, names=("wide", "tall"))]
    made = merge(given, "lego", {}, SPECS)
    assert list(made.modules) == ["tall", "wide"]
    assert torch.allclose(matrices(made.modules)["tall"], exact(given)["tall"], atol=1e-5)


def test_seeds_and_weights_and_sources_matter() -> None:
    given = sources()
    made = merged(given, "lego", rank=4)
    assert not close(merged([given[0], replace(given[1], weight=1.0), given[2]], "lego", rank=4), made, 1e-3)
    assert not close(merged([source(3, 9), *given[1:]], "lego", rank=4), made, 1e-3)
    many = [merged(given, "lego", rank=4, seed=seed, starts=1, iterations=1)["wide"] for seed in range(4)]
    assert any(not torch.allclose(many[0], other) for other in many[1:])


def test_more_starts_never_raise_the_inertia() -> None:
    given = sources((8, 8, 8))
    found = [merge(given, "lego", {"rank": 6, "starts": starts}, SPECS).clusters for starts in (1, 4, 16)]
    for name in SPECS:
        one, four, many = (each[name].inertia for each in found)
        assert one >= four >= many > 0
