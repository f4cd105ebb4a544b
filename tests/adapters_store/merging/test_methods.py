"""What every merge method must keep: identities, refusals, and the same bits whenever it runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters_store.compression import int4, int8
from adapters_store.compression.jointly import JointRecipe, compress_jointly
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, Form, GatedLowRank, LowRank, ModuleSpec, ReplacedWeight, SharedBasis
from adapters_store.merging.methods import METHODS, merge
from adapters_store.merging.parts import Source
from tests.adapters_store.compression.support import delta, dense
from tests.adapters_store.merging.support import RANKS, SHAPES, SPECS, close, exact, matrices, merged, source, sources

# The examples are for whoever finds the weights; the merge takes them as they are.
SEARCHED: dict[str, Any] = {"examples": [{"prompt": "p", "answer": "a"}]}
NEEDED = {"weight_search": SEARCHED}
EXACT_WITH_ONE: dict[str, dict[str, Any]] = {
    "lego": {},
    "linear": {},
    "cat": {},
    "svd": {},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "ties_svd": {"density": 1.0},
    "dare_linear_svd": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
    "magnitude_prune_svd": {"density": 1.0},
    "knots": {"density": 1.0},
    "tsv": {},
    "core_space": {"density": 1.0},
    "weight_search": SEARCHED,
}
EXACT_SUM: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}),
    ("task_arithmetic", {}),
    ("linear", {"rank": 12}),
    ("svd", {"rank": 12}),
    ("dare_linear_svd", {"rank": 12, "density": 1.0}),
    ("magnitude_prune_svd", {"rank": 12, "density": 1.0}),
    ("knots", {"operator": "linear"}),
    ("core_space", {"operator": "linear"}),
    ("core_space", {"operator": "magnitude_prune", "density": 1.0}),
]


def test_every_method_is_tested() -> None:
    assert set(METHODS) == {*EXACT_WITH_ONE, "iso_c"}


@pytest.mark.parametrize("method", EXACT_WITH_ONE)
@pytest.mark.parametrize("weight", [1.0, -2.5])
def test_one_adapter_is_itself(method: str, weight: float) -> None:
    given = [source(5, 3, weight)]
    assert close(merged(given, method, **EXACT_WITH_ONE[method]), exact(given))


@pytest.mark.parametrize(("method", "parameters"), EXACT_SUM)
@pytest.mark.parametrize("ranks", [RANKS, (1, 2, 9), (12, 12, 12)])
def test_what_loses_nothing_is_the_weighted_sum(
    method: str, parameters: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    """Also where the sources together have more ranks than the module."""
    given = sources(ranks)
    parameters = {**parameters, **({"rank": sum(ranks)} if "rank" in parameters else {})}
    assert close(merged(given, method, **parameters), exact(given))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_twice_and_on_two_threads(method: str) -> None:
    given = sources((4, 4, 4))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            found.append(merge(given, method, NEEDED.get(method, {}), SPECS).modules)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, (form,) in found[0].items():
        for other in (modules[name][0] for modules in found[1:]):
            assert isinstance(form, LowRank)
            assert isinstance(other, LowRank)
            assert all(torch.equal(getattr(form, part), getattr(other, part)) for part in ("a", "b", "d"))


@pytest.mark.parametrize("method", METHODS)
def test_another_source_or_weight_gives_another_result(method: str) -> None:
    given = sources((4, 4, 4))
    needed = NEEDED.get(method, {})
    made = merged(given, method, **needed)
    assert not close(merged([source(4, 8), *given[1:]], method, **needed), made, 1e-3)
    assert not close(merged([replace(given[0], weight=given[1].weight), *given[1:]], method, **needed), made, 1e-3)
    crossed = [replace(given[0], weight=given[1].weight), replace(given[1], weight=given[0].weight), given[2]]
    assert not close(merged(crossed, method, **needed), made, 1e-3)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("dare", "lego"))])
def test_the_order_of_the_sources_does_not_matter(method: str) -> None:
    given = sources((4, 4, 4))
    needed = NEEDED.get(method, {})
    assert close(merged(given[::-1], method, **needed), merged(given, method, **needed), 1e-4)


SEEDED = ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]


@pytest.mark.parametrize("method", SEEDED)
@pytest.mark.parametrize("mode", ["corrected", "peft_exact"])
def test_seeds(method: str, mode: str) -> None:
    given = sources((4, 4, 4))
    one, same, other = (merged(given, method, mode=mode, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not close(one, other, 1e-2)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*SEEDED, "lego")])
def test_the_gauge_of_the_factors_does_not_matter(method: str) -> None:
    """A delta whose training put its ranks elsewhere merges alike: (B T)(T^-1 A) for any T."""
    given = sources((4, 4, 4))
    turned = []
    for at, each in enumerate(given):
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(at)))[0]
        modules: dict[str, tuple[Form, ...]] = {}
        for name, (form,) in each.modules.items():
            assert isinstance(form, LowRank)
            modules[name] = (LowRank(turn.T @ (form.d[:, None] * form.a), 3 * form.b @ turn, torch.full((4,), 1 / 3)),)
        turned.append(replace(each, modules=modules))
    needed = NEEDED.get(method, {})
    assert close(merged(turned, method, **needed), merged(given, method, **needed), 2e-3)


def test_linear_is_the_best_of_its_rank() -> None:
    given = sources()
    for rank in (None, 2, 7):
        for name, matrix in merged(given, "linear", rank=rank).items():
            u, s, vh = torch.linalg.svd(exact(given)[name])
            kept = rank or max(RANKS)
            assert torch.allclose(matrix, (u[:, :kept] * s[:kept]) @ vh[:kept], atol=1e-4)


def test_elements_are_kept_and_elected_as_the_papers_say() -> None:
    """TIES by hand on dense deltas, with a rank that keeps all of it."""
    given = sources()
    stack = torch.stack([each.weight * matrices(each.modules)["wide"] for each in given]).float()
    count = int(0.3 * stack[0].numel())
    kept = torch.stack([torch.where(t.abs() >= t.abs().flatten().topk(count).values[-1], t, 0.0) for t in stack])
    sign = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == sign
    expected = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    found = merged(given, "ties_svd", density=0.3, rank=24)["wide"].float()
    assert torch.allclose(found, expected, atol=1e-4)
    pruned = merged(given, "magnitude_prune_svd", density=0.3, rank=24)["wide"].float()
    assert torch.allclose(pruned, kept.sum(dim=0), atol=1e-4)
    frequent = merged(given, "ties_svd", density=0.3, rank=24, majority_sign_method="frequency")["wide"].float()
    assert not torch.allclose(frequent, expected, atol=1e-2)


def test_dare_keeps_the_expectation() -> None:
    given = sources()
    runs = [merged(given, "dare_linear_svd", density=0.5, rank=24, seed=seed)["wide"] for seed in range(200)]
    mean = torch.stack(runs).mean(dim=0)
    assert (mean - exact(given)["wide"]).norm() < 0.12 * exact(given)["wide"].norm()
    zeros = (merged([given[0]], "dare_linear_svd", density=0.5, rank=24)["wide"].abs() < 1e-4).double().mean()
    assert 0.4 < zeros < 0.6


def test_large_matrices_are_approximated_well() -> None:
    """Beyond the exact decomposition; a delta of rank 4 and noise of full rank."""
    spec = {"m": ModuleSpec("linear", 600, 640)}
    given = [Source({"m": (delta(4, 600, 640, seed=seed),)}) for seed in range(2)]
    found = merge(given, "magnitude_prune_svd", {"density": 0.8, "rank": 8}, spec).modules["m"][0]
    assert isinstance(found, LowRank)
    kept = []
    for each in given:
        form = each.modules["m"][0]
        assert isinstance(form, LowRank)
        matrix = dense(form).float()
        least = matrix.abs().flatten().kthvalue(matrix.numel() - int(0.8 * matrix.numel()) + 1).values
        kept.append(torch.where(matrix.abs() >= least, matrix, 0.0))
    whole = kept[0] + kept[1]
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    best = (whole - (u[:, :8] * s[:8]) @ vh[:8]).norm()
    assert (whole - dense(found).float()).norm() <= 1.001 * best


def test_tsv_turns_the_sources_away_from_each_other() -> None:
    """Its singular values are those of the sources, its vectors orthonormal; orthogonal sources are left alone."""
    given = sources((3, 5, 4), (1.0, 1.0, 1.0))
    for name, matrix in merged(given, "tsv").items():
        values = torch.cat(
            [torch.linalg.svdvals(matrices(each.modules)[name])[:rank] for each, rank in zip(given, RANKS, strict=True)]
        )
        assert torch.allclose(torch.linalg.svdvals(matrix)[:12], values.sort(descending=True).values, rtol=1e-4)
    apart = [
        Source({"wide": (LowRank(torch.eye(24)[rows], torch.eye(40)[:, rows], torch.tensor([3.0, 2.0])),)})
        for rows in ([0, 1], [2, 3])
    ]
    assert close(merged(apart, "tsv"), exact(apart))
    kept = torch.linalg.svdvals(merged(given, "tsv", rank=6)["wide"])
    assert int((kept > 1e-4).sum()) == 6


def test_iso_c_has_equal_singular_values() -> None:
    given = sources()
    for rank in (None, 4):
        made, plain = merged(given, "iso_c", rank=rank)["wide"], torch.linalg.svdvals(exact(given)["wide"])
        kept = rank or 12
        values = torch.linalg.svdvals(made)
        assert torch.allclose(values[:kept], plain[:kept].mean().expand(kept), rtol=1e-4)
        assert not (values[kept:] > 1e-4).any()


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_subspaces_prune_and_elect(method: str) -> None:
    given = sources()
    plain = merged(given, method, operator="linear")
    for operator in ("ties", "dare_ties", "dare_linear", "magnitude_prune"):
        made = merged(given, method, operator=operator, density=0.5)
        assert not close(made, plain, 1e-2), operator
        assert all(torch.linalg.matrix_rank(matrix) <= 12 for matrix in made.values())
    assert torch.linalg.matrix_rank(merged(given, method, rank=3)["wide"]) == 3


def test_compressed_sources() -> None:
    """int8, int4 and a shared basis, each merged as the delta that it stands for."""
    plain = [delta(4, *SHAPES["wide"], seed=seed) for seed in range(3)]
    adapters = [AdapterWeights("", {"wide": (form,)}) for form in plain[:2]]
    shared = compress_jointly(adapters, JointRecipe("jd_full", 4))[0].made.modules["wide"][0]
    assert isinstance(shared, SharedBasis)
    forms: list[Any] = [shared, int8.quantized(plain[1])[0], int4.quantized(plain[2])[0]]
    given = [Source({"wide": (form,)}, weight) for form, weight in zip(forms, (1.0, -0.5, 2.0), strict=True)]
    wide = [replace(each, modules={"wide": (form.widened(),)}) for each, form in zip(given, forms, strict=True)]
    for method in METHODS:
        made = merge(given, method, NEEDED.get(method, {}), SPECS).modules["wide"][0]
        assert isinstance(made, LowRank)
        assert made.a.dtype == torch.float32
    assert close(merged(given, "cat"), exact(wide))


def test_factors_keep_their_type() -> None:
    halves = [Source({"wide": (delta(4, *SHAPES["wide"], seed=seed, dtype=torch.bfloat16),)}) for seed in range(2)]
    for method in METHODS:
        made = merge(halves, method, NEEDED.get(method, {}), SPECS).modules["wide"][0]
        assert isinstance(made, LowRank)
        assert made.a.dtype == made.b.dtype == torch.bfloat16
        assert made.d.dtype == torch.float32


def test_biases_add_up() -> None:
    form = delta(4, *SHAPES["wide"])
    biased = LowRank(form.a, form.b, form.d, torch.arange(40.0))
    given = [Source({"wide": (biased,)}, 2.0), Source({"wide": (form,)}), Source({"wide": (biased,)}, -0.5)]
    for method in METHODS:
        made = merge(given, method, NEEDED.get(method, {}), SPECS).modules["wide"][0]
        assert isinstance(made, LowRank)
        assert made.bias is not None, method
        assert torch.allclose(made.bias, 1.5 * torch.arange(40.0))


def test_what_is_no_low_rank_delta_is_refused_by_name() -> None:
    form = delta(4, *SHAPES["wide"])
    gated = GatedLowRank(form.a, form.b, form.d, torch.zeros(4, 24), None, 2)
    for other, name in ((gated, "gated_low_rank"), (ReplacedWeight(torch.zeros(40, 24)), "replaced_weight")):
        with pytest.raises(AdapterInvalid, match=name) as caught:
            merge([Source({"wide": (form,)}), Source({"wide": (other,)})], "lego", {}, SPECS)
        assert (caught.value.status, caught.value.code, caught.value.param) == (422, "feature_unsupported", "sources")


@pytest.mark.parametrize(
    ("method", "parameters", "code", "param"),
    [
        ("lego2", {}, "unknown_method", "method"),
        ("lego", {"density": 0.5}, "unknown_parameter", "parameters.density"),
        ("cat", {"rank": 4}, "unknown_parameter", "parameters.rank"),
        ("lego", {"rank": 0}, "bad_parameter", "parameters.rank"),
        ("lego", {"rank": "4"}, "bad_parameter", "parameters.rank"),
        ("lego", {"rank": True}, "bad_parameter", "parameters.rank"),
        ("lego", {"norm": "l1"}, "bad_parameter", "parameters.norm"),
        ("ties", {"density": 0}, "bad_parameter", "parameters.density"),
        ("ties", {"density": 1.5}, "bad_parameter", "parameters.density"),
        ("ties", {"density": float("nan")}, "bad_parameter", "parameters.density"),
        ("dare_ties", {"seed": -1}, "bad_parameter", "parameters.seed"),
        ("linear", {"mode": "peft_exact", "rank": 3}, "bad_parameter", "parameters"),
        ("ties_svd", {"clamp": 0.5}, "bad_parameter", "parameters"),
        ("tsv", {"rank": 2}, "rank_too_low", "rank"),
    ],
)
def test_bad_parameters(method: str, parameters: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        merge(sources(), method, parameters, SPECS)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_no_sources_and_bad_weights() -> None:
    for given, code in (([], "no_sources"), ([source(2, 0, float("inf"))], "bad_parameter")):
        with pytest.raises(AdapterInvalid) as caught:
            merge(given, "cat", {}, SPECS)
        assert caught.value.code == code
    with pytest.raises(AdapterInvalid) as caught:
        merge([source(2, 0, 1e300)], "linear", {}, SPECS)
    assert caught.value.code == "nonfinite_weights"


def test_progress_is_told() -> None:
    told: list[float] = []
    merge(sources(), "cat", {}, SPECS, told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("method", ["svd", "ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_what_overflows_is_refused(method: str) -> None:
    huge = LowRank(torch.full((2, 24), 3e38), torch.full((40, 2), 3e38), torch.ones(2))
    given = [Source({"wide": (huge,)}, 1.0), source(2, 1, names=["wide"])]
    told = {"rank": 2, **({"mode": "peft_exact"} if method == "svd" else {})}
    with pytest.raises(AdapterInvalid) as caught:
        merge(given, method, told, SPECS)
    assert caught.value.code == "nonfinite_weights"
