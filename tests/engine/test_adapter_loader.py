"""Loads in the background: read once, kept in host memory, and never behind a prefetch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapters_store.errors import AdapterCorrupt
from adapters_store.forms import AdapterWeights, LowRank
from server.engine.adapter_loader import AdapterLoader, Loaded
from server.engine.host_cache import HostCache
from server.engine.packing import PackedAdapter, pack

PATIENCE = 60


def packed(weights: AdapterWeights) -> PackedAdapter:
    return pack(weights, frozenset(), 1 << 16)


class Store:
    """Adapters by digest; reading waits while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.reads: list[str] = []
        self.broken: set[str] = set()

    def load(self, digest: str) -> AdapterWeights:
        self.reads.append(digest)
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        if digest in self.broken:
            raise AdapterCorrupt("bits rotted")
        form = LowRank(torch.ones(2, 3), torch.ones(4, 2), torch.ones(2))
        return AdapterWeights(digest, {"m": (form,)})


@contextmanager
def loader(store: Store, limit: int = 1 << 20) -> Iterator[tuple[AdapterLoader, threading.Semaphore]]:
    done = threading.Semaphore(0)
    made = AdapterLoader(store.load, packed, done.release, HostCache(limit))
    try:
        yield made, done
    finally:
        store.gate.set()
        made.close()


def ended(own: AdapterLoader, done: threading.Semaphore, count: int) -> list[Loaded]:
    for _ in range(count):
        assert done.acquire(timeout=PATIENCE)
    return own.poll()


def test_the_second_load_comes_from_host_memory_at_once() -> None:
    store = Store()
    with loader(store) as (own, done):
        own.start("a")
        [first] = ended(own, done, 1)
        own.start("a")
        assert own.has_ended, "nobody has to wait for another thread"
        [second] = own.poll()
        assert second.adapter is first.adapter
        assert store.reads == ["a"]
        assert own.seconds.read.sum > 0
        assert own.seconds.pack.sum > 0


def test_without_room_in_host_memory_it_is_read_again() -> None:
    store = Store()
    with loader(store, limit=0) as (own, done):
        for _ in range(2):
            own.start("a")
            [loaded] = ended(own, done, 1)
            assert loaded.adapter is not None
        assert store.reads == ["a", "a"]


def test_a_load_joins_the_prefetch_of_its_own_adapter() -> None:
    store = Store()
    store.gate.clear()
    with loader(store) as (own, done):
        own.prefetch(["a"])
        assert store.entered.acquire(timeout=PATIENCE)
        own.start("a")
        own.prefetch(["a"])
        store.gate.set()
        [loaded] = ended(own, done, 1)
        assert loaded.adapter is not None
        assert store.reads == ["a"]


def test_a_load_overtakes_the_prefetches_before_its_own() -> None:
    """The one prefetching thread is stuck on `slow`; `urgent`, queued behind it, is read by a loader thread."""
    store = Store()
    with loader(store) as (own, done):
        store.gate.clear()
        own.prefetch(["slow", "urgent"])
        assert store.entered.acquire(timeout=PATIENCE)
        own.start("urgent")
        assert store.entered.acquire(timeout=PATIENCE)
        assert store.reads == ["slow", "urgent"]
        store.gate.set()
        [loaded] = ended(own, done, 1)
        assert loaded.digest == "urgent"
    assert store.reads == ["slow", "urgent"], "the prefetch finds it done"


def test_a_prefetch_tells_nobody() -> None:
    store = Store()
    with loader(store) as (own, done):
        own.prefetch(["a", "b"])
        own.start("b")
        [loaded] = ended(own, done, 1)
        assert loaded.digest == "b"
        assert not own.has_ended


def test_nothing_is_prefetched_that_would_not_be_kept() -> None:
    store = Store()
    with loader(store, limit=100) as (own, done):
        own.start("a")
        ended(own, done, 1)
        own.prefetch(["b"])
        own.start("c")
        ended(own, done, 1)
        assert store.reads == ["a", "c"]


def test_without_host_memory_nothing_is_prefetched() -> None:
    store = Store()
    with loader(store, limit=0) as (own, done):
        own.prefetch(["b"])
        own.start("c")
        ended(own, done, 1)
        assert store.reads == ["c"]


def test_a_failed_prefetch_is_tried_again_by_the_load() -> None:
    store = Store()
    store.broken.add("a")
    with loader(store) as (own, done):
        own.prefetch(["a", "b"])
        own.start("b")
        ended(own, done, 1)
        own.start("a")
        [failed] = ended(own, done, 1)
        assert failed.error is not None
        assert failed.error.code == "adapter_corrupt"
        store.broken.clear()
        own.start("a")
        [loaded] = ended(own, done, 1)
        assert loaded.adapter is not None


def test_closing_breaks_the_promises_that_are_not_begun() -> None:
    """No thread is left waiting for a prefetch that will never be read."""
    store = Store()
    store.gate.clear()
    with loader(store) as (own, _):
        own.prefetch(["a", "b", "c"])
        assert store.entered.acquire(timeout=PATIENCE)
        closing = threading.Thread(target=own.close)
        closing.start()
        while not own._closed:
            assert closing.is_alive()
        store.gate.set()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert store.reads == ["a"]


class TestOutcomes:
    def outcome(self, error: Exception) -> tuple[str | None, str]:
        def broken(digest: str) -> AdapterWeights:
            raise error

        done = threading.Event()
        loader = AdapterLoader(broken, packed, done.set, HostCache(0))
        loader.start("x")
        assert done.wait(60)
        [ended] = loader.poll()
        loader.close()
        assert not loader.has_ended
        assert ended.adapter is None
        assert ended.error is not None
        return ended.error.code, ended.error.message

    def test_a_coded_error_is_passed_on(self) -> None:
        assert self.outcome(AdapterCorrupt("bits rotted")) == ("adapter_corrupt", "bits rotted")

    def test_any_other_error_is_an_engine_failure_without_its_text(self) -> None:
        code, message = self.outcome(OSError("/secret/path"))
        assert code == "engine_failure"
        assert "OSError" in message
        assert "secret" not in message

    def test_loads_end_in_any_order_and_are_collected_once(self) -> None:
        done = threading.Semaphore(0)
        loader = AdapterLoader(lambda digest: AdapterWeights(digest, {}), packed, done.release, HostCache(0))
        for index in range(5):
            loader.start(str(index))
        for _ in range(5):
            assert done.acquire(timeout=60)
        assert sorted(ended.digest for ended in loader.poll()) == list("01234")
        assert loader.poll() == []
        loader.close()


def test_a_prefetch_that_ends_while_the_load_waits_for_a_thread_is_not_repeated() -> None:
    store = Store()
    with loader(store) as (own, done):
        own.prefetch(["x"])
        assert store.entered.acquire(timeout=PATIENCE)
        own._prefetching.submit(int).result(PATIENCE)  # behind the prefetch, on its one thread
        own._run("x")  # as a loader thread that was busy when `start` found nothing in host memory
        [loaded] = ended(own, done, 1)
        assert loaded.adapter is not None
        assert store.reads == ["x"]


def test_what_failed_lately_is_not_prefetched() -> None:
    store = Store()
    store.broken.add("a")
    with loader(store) as (own, done):
        own.start("a")
        ended(own, done, 1)
        for _ in range(3):
            own.prefetch(["a"])
        own.start("b")
        ended(own, done, 1)
    assert store.reads == ["a", "b"]
