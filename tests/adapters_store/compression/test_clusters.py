"""Clusters of adapters: kin come together, rounds only better, and the errors are those of the dense matrices."""

from itertools import pairwise

import pytest
import torch

from adapters_store.compression import clusters
from adapters_store.compression.clusters import Collection, compress_collection
from adapters_store.compression.joint import Method, join
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from tests.adapters_store.compression.support import delta, dense

MODULES = {"q": (14, 11), "down": (9, 13)}
BOTH: list[Method] = ["full", "diag"]


def family(seed: int, count: int) -> list[dict[str, LowRank]]:
    """Adapters on the same directions of rank 2, each with its own mixture of them and its own size."""
    made = []
    for member in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + member)
        modules = {}
        for place, (name, (inputs, outputs)) in enumerate(MODULES.items()):
            shared, own = delta(2, inputs, outputs, seed=10 * seed + place), delta(2, inputs, outputs, seed=member)
            mixing = torch.randn(2, 2, generator=generator) * (1 + 5 * (member % 3))
            modules[name] = LowRank(shared.a, shared.b @ mixing + 0.01 * own.b, torch.ones(2))
        made.append(modules)
    return made


def mixed() -> list[dict[str, LowRank]]:
    """Three families of four, one after the other's member."""
    return [adapter for four in zip(*(family(seed, 4) for seed in (1, 2, 3)), strict=True) for adapter in four]


def groups(found: Collection) -> set[frozenset[int]]:
    return {frozenset(members.tolist()) for members in found.members}


@pytest.mark.parametrize("method", BOTH)
def test_errors_are_the_dense_ones(method: Method) -> None:
    adapters = mixed()
    found = compress_collection(adapters, 2, 3, method)
    assert sorted(torch.cat(found.members).tolist()) == list(range(12))
    for members, basis in zip(found.members, found.bases, strict=True):
        for place, index in enumerate(members.tolist()):
            pairs = [(dense(adapters[index][name]), dense(basis[name].delta(place))) for name in MODULES]
            lost = sum(float((one - other).norm() ** 2) for one, other in pairs)
            whole = sum(float(one.norm() ** 2) for one, _ in pairs)
            assert float(found.errors[index]) == pytest.approx((lost / whole) ** 0.5, abs=1e-6)


def test_kin_come_together_and_lose_little() -> None:
    found = compress_collection(mixed(), 2, 3)
    assert groups(found) == {frozenset(range(first, 12, 3)) for first in range(3)}
    assert float(found.errors.max()) < 0.05
    one = compress_collection(mixed(), 2)
    assert len(one.members) == 1
    assert float(one.errors.mean()) > 5 * float(found.errors.mean())


def test_unrelated_adapters_lose_most_of_themselves() -> None:
    """Sixteen of rank 2 in a basis of rank 4: what cannot be shared is lost, and the error says so."""
    adapters = [{name: delta(2, *MODULES[name], seed=7 * seed + len(name)) for name in MODULES} for seed in range(16)]
    assert float(compress_collection(adapters, 4).errors.mean()) > 0.5


@pytest.mark.parametrize("method", BOTH)
def test_rounds_only_better(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    adapters = [family(seed, 2)[0] for seed in range(9)]
    modules = clusters._stacked(adapters)
    means = []
    for rounds in range(5):
        monkeypatch.setattr(clusters, "ROUNDS", rounds)
        found = compress_collection(adapters, 2, 3, method)
        squares = torch.zeros(9, dtype=torch.float64)
        for members, basis in zip(found.members, found.bases, strict=True):
            for name in modules:
                squares[members] += basis[name].errors ** 2
        means.append(float(squares.mean()))
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(means))


def test_as_many_clusters_as_adapters_is_each_by_itself() -> None:
    adapters = [{"q": delta(2, 14, 11, seed=seed)} for seed in range(4)]
    found = compress_collection(adapters, 2, 10)
    assert sorted(len(members) for members in found.members) == [1, 1, 1, 1]
    assert float(found.errors.max()) < 1e-3


def test_one_cluster_is_one_basis() -> None:
    adapters = mixed()
    alone = join(clusters._stacked(adapters)["q"], 3)
    assert torch.equal(compress_collection(adapters, 3).bases[0]["q"].cores, alone.cores)


def test_modules_must_agree() -> None:
    with pytest.raises(AdapterInvalid) as caught:
        compress_collection([{"q": delta(1, 4, 4)}, {"v": delta(1, 4, 4)}], 1)
    assert caught.value.code == "modules_differ"


def test_kmeans_leaves_no_cluster_empty() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 0.1], [5.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    found = clusters._kmeans(points, 3)
    assert set(found.tolist()) == set(range(int(found.max()) + 1))
    assert found[0] == found[3] != found[2]
    assert clusters._kmeans(torch.zeros(3, 2, dtype=torch.float64), 3).tolist() == [0, 0, 0]
