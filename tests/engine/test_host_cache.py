"""Adapters in host memory: a budget in bytes, the order of eviction, and parts held once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.host_cache import HostCache
from server.engine.packing import PackedAdapter


def packed(digest: str, size: int = 100, **shared: int) -> PackedAdapter:
    """An adapter of `size` own bytes; shared parts by key and size."""
    parts = {key.encode(): (torch.zeros(count, dtype=torch.uint8),) for key, count in shared.items()}
    return PackedAdapter(digest, (torch.zeros(size, dtype=torch.uint8),), {}, parts)


def filled(limit: int, *digests: str) -> HostCache:
    cache = HostCache(limit)
    for digest in digests:
        cache.put(packed(digest))
    return cache


def test_what_was_put_is_found_and_counted() -> None:
    cache = filled(1000, "a")
    assert cache.get("b") is None
    found = cache.get("a")
    assert found is not None
    assert found.digest == "a"
    assert ("a" in cache, "b" in cache, len(cache), cache.bytes_used) == (True, False, 1, 100)
    assert (cache.counters.hits, cache.counters.misses, cache.counters.evictions) == (1, 1, 0)


def test_the_least_recently_used_goes_first() -> None:
    cache = filled(300, "a", "b", "c")
    cache.get("a")
    cache.put(packed("d"))
    assert ["a" in cache, "b" in cache, "c" in cache, "d" in cache] == [True, False, True, True]
    assert cache.counters.evictions == 1
    assert cache.bytes_used == 300


def test_what_the_device_has_goes_before_what_it_has_not() -> None:
    cache = HostCache(300, {"b", "c"}.__contains__)
    for digest in "abc":
        cache.put(packed(digest))
    cache.put(packed("d", 200))
    assert ["a" in cache, "b" in cache, "c" in cache] == [True, False, False]


def test_one_that_is_larger_than_all_is_not_kept_and_evicts_nothing() -> None:
    cache = filled(300, "a", "b")
    assert cache.put(packed("large", 301)).digest == "large"
    assert ["a" in cache, "b" in cache, "large" in cache] == [True, True, False]


def test_no_room_at_all() -> None:
    cache = filled(0, "a")
    assert len(cache) == 0
    assert cache.get("a") is None


def test_put_twice_counts_once() -> None:
    cache = filled(1000, "a", "a")
    assert cache.bytes_used == 100
    cache.check_integrity()


def test_a_shared_part_is_held_and_counted_once() -> None:
    cache = HostCache(1000)
    first = cache.put(packed("a", 100, basis=400))
    second = cache.put(packed("b", 100, basis=400))
    assert second.shared[b"basis"][0] is first.shared[b"basis"][0], "the copy of the second is not kept"
    assert cache.bytes_used == 600
    cache.drop("a")
    assert cache.bytes_used == 500
    cache.drop("b")
    assert cache.bytes_used == 0
    cache.check_integrity()


def test_a_part_that_left_is_taken_from_its_next_user() -> None:
    cache = HostCache(1000)
    first = cache.put(packed("a", 100, basis=400))
    cache.drop("a")
    second = cache.put(packed("b", 100, basis=400))
    assert second.shared[b"basis"][0] is not first.shared[b"basis"][0]
    cache.check_integrity()


def test_dropping_what_is_not_there_is_no_fault() -> None:
    cache = filled(1000, "a")
    cache.drop("z")
    assert len(cache) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 300), st.sampled_from(["", "x", "y"])), max_size=40)
)
def test_bytes_stay_in_the_budget(puts: list[tuple[str, int, str]]) -> None:
    cache = HostCache(600, {"b", "e"}.__contains__)
    for digest, size, part in puts:
        cache.put(packed(digest, size, **({part: 150} if part else {})))
        assert cache.bytes_used <= 600
        cache.check_integrity()
        if size % 7 == 0:
            cache.drop(digest)
            cache.check_integrity()
