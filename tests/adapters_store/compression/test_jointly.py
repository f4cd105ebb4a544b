"""A collection as shared bases: what is shared, what stays one's own, the errors that are stated, what is refused."""

import math

import pytest
import torch

from adapters_store.compression.jointly import JointMethod, JointRecipe, compress_jointly
from adapters_store.compression.recipe import Recipe, compress
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, LowRank, ReplacedWeight, SharedBasis
from tests.adapters_store.compression.support import delta, dense

SHAPES = {"q": (20, 16), "down": (24, 20)}
HEAD = ReplacedWeight(torch.ones(3, 2))
METHODS: tuple[JointMethod, ...] = ("jd_full", "jd_diag")


def family(seed: int, count: int, noise: float) -> list[AdapterWeights]:
    """Adapters that mix the ranks of one delta of rank 3 in each module, and add noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    parents = {name: delta(3, *shape, seed=seed * 10 + place) for place, (name, shape) in enumerate(SHAPES.items())}
    made = []
    for number in range(count):
        modules = {}
        for name, parent in parents.items():
            own = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=generator)
            extra = noise * torch.randn(parent.a.shape, generator=generator)
            modules[name] = (LowRank(own @ parent.a + extra, parent.b, parent.d, torch.arange(len(parent.b)) * 1.0),)
        made.append(AdapterWeights(f"{seed}{number}", {**modules, "head": (HEAD,)}))
    return made


def forms(modules: object, name: str) -> SharedBasis:
    form = modules[name][0]  # type: ignore[index]
    assert isinstance(form, SharedBasis)
    return form


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_are_those_of_the_dense_matrices(method: JointMethod) -> None:
    adapters = family(1, 5, noise=0.3)
    members = compress_jointly(adapters, JointRecipe(method, rank=3))
    for weights, member in zip(adapters, members, strict=True):
        lost, whole = {}, {}
        for name in SHAPES:
            before, after = weights.modules[name][0], forms(member.made.modules, name)
            assert isinstance(before, LowRank)
            assert after.core.shape == ((3,) if method == "jd_diag" else (3, 3))
            lost[name] = float((dense(after.widened()) - dense(before)).norm())
            whole[name] = float(dense(before).norm())
        assert member.made.errors == pytest.approx({name: lost[name] / whole[name] for name in SHAPES}, rel=1e-4)
        total = math.hypot(*lost.values()) / math.hypot(*whole.values())
        assert member.made.relative_error == pytest.approx(total, rel=1e-4)


def test_what_the_bases_hold_is_kept() -> None:
    """But for the rounding of the bases to bfloat16."""
    for member in compress_jointly(family(2, 6, noise=0.0), JointRecipe("jd_full", rank=3)):
        assert member.made.relative_error < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_two_families_need_two_clusters(method: JointMethod) -> None:
    adapters = family(3, 3, noise=0.01) + family(4, 3, noise=0.01)
    one = compress_jointly(adapters, JointRecipe(method, rank=3))
    two = compress_jointly(adapters, JointRecipe(method, rank=3, clusters=2))
    assert {member.cluster for member in one} == {0}
    clusters = [member.cluster for member in two]
    assert clusters in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    worst = [max(member.made.relative_error for member in members) for members in (one, two)]
    assert worst[1] < worst[0] * 0.8
    for name in SHAPES:
        first, second, other = (forms(two[place].made.modules, name) for place in (0, 1, 3))
        assert first.u.data_ptr() == second.u.data_ptr()
        assert torch.equal(first.v, second.v)
        assert not torch.equal(first.u, other.u)
        assert not torch.equal(first.core, second.core)


def test_biases_and_heads_stay() -> None:
    adapters = family(5, 2, noise=0.1)
    for weights, member in zip(adapters, compress_jointly(adapters, JointRecipe("jd_diag", rank=2)), strict=True):
        assert member.made.modules.keys() == weights.modules.keys()
        assert member.made.modules["head"] == (HEAD,)
        for name in SHAPES:
            before = weights.modules[name][0]
            assert isinstance(before, LowRank)
            assert forms(member.made.modules, name).bias is before.bias


def test_what_is_refused() -> None:
    adapters, recipe = family(6, 3, noise=0.1), JointRecipe("jd_full", rank=2)
    small = AdapterWeights("c", compress(adapters[0], Recipe("int4")).modules)
    other = AdapterWeights("o", {"q": adapters[0].modules["q"]})
    shared = AdapterWeights("s", compress_jointly(adapters, recipe)[0].made.modules)
    for given, how, code in (
        (adapters[:1], recipe, "too_few_adapters"),
        (adapters, JointRecipe("jd_full", rank=2, clusters=4), "too_few_adapters"),
        ([*adapters, small], recipe, "already_compressed"),
        ([*adapters, shared], recipe, "already_compressed"),
        ([*adapters, AdapterWeights("h", {"head": (HEAD,)})], recipe, "nothing_to_compress"),
        ([*adapters, other], recipe, "modules_differ"),
    ):
        with pytest.raises(AdapterInvalid) as caught:
            compress_jointly(given, how)
        assert (caught.value.status, caught.value.code) == (422, code)


def test_a_collection_that_would_grow_is_refused() -> None:
    """Five adapters of rank 3 in bases of rank 15 (all that they span), each with a full core."""
    with pytest.raises(AdapterInvalid, match="Together the adapters would take") as caught:
        compress_jointly(family(1, 5, noise=0.3), JointRecipe("jd_full", rank=24))
    assert caught.value.code == "nothing_to_compress"
