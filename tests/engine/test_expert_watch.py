"""What is made of the counters of gated adapters: shares, entropy, and who is told of in the metrics."""

import math

import pytest

from server.engine import expert_watch
from server.engine.adapter_pool import AdapterPool
from server.engine.expert_watch import MOST, ExpertWatch
from server.engine.page_allocator import PageAllocator
from server.engine.status import ExpertLoad, mean_entropy


class Storage:
    """Counters by slot; a slot without any has no gates."""

    def __init__(self) -> None:
        self.loads: dict[int, dict[str, ExpertLoad]] = {}
        self.reads = 0

    def gated(self, slot: int) -> bool:
        return bool(self.loads.get(slot))

    def experts(self, slot: int) -> dict[str, ExpertLoad]:
        return self.loads.get(slot, {})

    def entropy(self, slot: int) -> float | None:
        self.reads += 1
        return mean_entropy(self.loads[slot])


def world(count: int) -> tuple[ExpertWatch, Storage, AdapterPool]:
    """`count` resident adapters, oldest first; all but each third are gated."""
    storage, pool = Storage(), AdapterPool(PageAllocator(64, 64), 64)
    for number in range(count):
        place(storage, pool, f"{number:02}", gated=number % 3 != 2)
    return ExpertWatch(storage, pool, "trial-"), storage, pool


def place(storage: Storage, pool: AdapterPool, digest: str, *, gated: bool = True) -> None:
    pool.want(digest)
    pool.take_wanted(1)
    placement = pool.place(digest, [64])
    assert placement is not None
    storage.loads[placement.slot] = {"m": ExpertLoad(1, (3, 1))} if gated else {}


def test_numbers_of_a_load() -> None:
    load = ExpertLoad(2, (4, 0, 2, 2))
    assert load.tokens == 4
    assert load.shares == [0.5, 0.0, 0.25, 0.25]
    assert load.entropy == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert load.unused == 1


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [((5, 5, 5), 1.0), ((7, 0, 0), 0.0), ((0, 0), None), ((9,), 1.0), ((0,), None)],
    ids=str,
)
def test_entropy_at_the_ends(counts: tuple[int, ...], entropy: float | None) -> None:
    load = ExpertLoad(1, counts)
    assert load.entropy == (None if entropy is None else pytest.approx(entropy))
    assert sum(load.shares) == pytest.approx(0.0 if entropy is None else 1.0)


def test_the_mean_leaves_out_modules_without_tokens() -> None:
    loads = {"a": ExpertLoad(1, (1, 1)), "b": ExpertLoad(1, (0, 0)), "c": ExpertLoad(1, (2, 0))}
    assert mean_entropy(loads) == pytest.approx(0.5)
    assert mean_entropy({"b": loads["b"]}) is None


def test_reads_what_is_resident() -> None:
    watch, _, _ = world(3)
    assert watch.read("00") == {"m": ExpertLoad(1, (3, 1))}
    assert watch.read("02") == {}
    assert watch.read("absent") == {}


def test_only_the_last_used_are_told_of() -> None:
    watch, storage, pool = world(30)
    assert pool.acquire(["00"])
    watch.look(now=True)
    assert watch.resident == 20
    told = [digest for digest, _ in watch.entropies]
    assert len(told) == MOST
    assert told[-1] == "00"
    assert "01" not in told
    assert storage.reads == MOST


def test_adapters_on_trial_are_not_told_of() -> None:
    watch, storage, pool = world(1)
    place(storage, pool, "trial-1")
    watch.look(now=True)
    assert (watch.resident, [digest for digest, _ in watch.entropies]) == (1, ["00"])


def test_looks_seldom_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 100.0
    monkeypatch.setattr("server.engine.expert_watch.time.monotonic", lambda: seconds)
    watch, storage, _ = world(1)
    for _ in range(3):
        watch.look(now=False)
    assert storage.reads == 1
    watch.look(now=True)
    assert storage.reads == 2
    seconds += expert_watch.EVERY
    watch.look(now=False)
    assert storage.reads == 3
