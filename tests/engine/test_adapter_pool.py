"""Which adapters are resident, who uses them, and who makes room for whom."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.adapter_pool import AdapterPool, Placement
from server.engine.page_allocator import PageAllocator
from server.engine.status import Residency
from tests.engine.support import PAGE, load


def make_pool(pages: int = 4, slots: int = 8) -> AdapterPool:
    return AdapterPool(PageAllocator(pages, PAGE), slots)


def residents(pool: AdapterPool, *digests: str) -> None:
    for digest in digests:
        assert load(pool, digest) is not None


def test_life_of_an_adapter() -> None:
    pool = make_pool()
    assert pool.residency("a") is Residency.ABSENT
    assert not pool.acquire(["a"])
    assert pool.residency("a") is Residency.LOADING
    assert pool.take_wanted(1) == ["a"]
    assert pool.residency("a") is Residency.LOADING
    placement = pool.place("a", [PAGE, 10])
    assert placement is not None
    assert pool.residency("a") is Residency.RESIDENT
    assert pool.slot("a") == placement.slot
    assert (pool.num_resident, pool.num_pending, pool.bytes_used) == (1, 0, 2 * PAGE)
    assert pool.acquire(["a"])
    pool.check_integrity([["a"]])
    pool.release(["a"])
    pool.check_integrity([])
    assert pool.residency("a") is Residency.RESIDENT, "an unused adapter stays until its room is needed"


def test_acquire_takes_all_or_none_and_asks_for_what_is_missing() -> None:
    pool = make_pool()
    residents(pool, "a")
    assert not pool.acquire(["a", "b", "c"])
    pool.check_integrity([])
    assert set(pool.take_wanted(8)) == {"b", "c"}


def test_an_adapter_named_twice_by_one_request_counts_once() -> None:
    pool = make_pool()
    residents(pool, "a")
    assert pool.acquire(["a", "a"])
    pool.check_integrity([("a", "a")])
    pool.release(["a", "a"])
    pool.check_integrity([])


def test_the_least_recently_acquired_goes_first() -> None:
    pool = make_pool(pages=3)
    residents(pool, "a", "b", "c")
    assert pool.acquire(["a"])
    pool.release(["a"])
    residents(pool, "d")
    assert [pool.residency(d) is Residency.RESIDENT for d in "abcd"] == [True, False, True, True]
    assert pool.counters.evictions == 1


def test_an_adapter_in_use_is_never_evicted() -> None:
    pool = make_pool(pages=2)
    residents(pool, "a", "b")
    assert pool.acquire(["a"])
    residents(pool, "c")
    assert pool.residency("a") is Residency.RESIDENT
    assert pool.residency("b") is Residency.ABSENT


@pytest.mark.parametrize("protect", ["reference", "pin", "keep"])
def test_a_placement_that_fails_evicts_nothing(protect: str) -> None:
    """Load before evict: `b` alone would be evicted in vain, so it stays where it was, slot and pages."""
    pool = make_pool(pages=3)
    residents(pool, "a", "b", "c")
    before = {d: (pool.slot(d), pool._resident[d]) for d in "abc"}
    if protect == "reference":
        assert pool.acquire(["a"])
    if protect == "pin":
        pool.pin("a")
    pool.want("d")
    pool.take_wanted(1)
    assert pool.place("d", [PAGE] * 3, keep={"a"} if protect == "keep" else frozenset()) is None
    assert {d: (pool.slot(d), pool._resident[d]) for d in "abc"} == before
    assert pool.counters.evictions == 0
    assert pool.residency("d") is Residency.LOADING, "the load waits for room"
    pool.check_integrity([["a"]] if protect == "reference" else [])
    assert pool.place("d", [PAGE] * 2, keep={"a"}) is not None
    assert pool.residency("b") is pool.residency("c") is Residency.ABSENT


def test_a_failed_placement_keeps_the_order_of_eviction() -> None:
    pool = make_pool(pages=3)
    residents(pool, "a", "b", "c")
    pool.want("d")
    pool.take_wanted(1)
    assert pool.place("d", [PAGE] * 4) is None
    assert pool.place("d", [PAGE]) is not None
    assert pool.residency("a") is Residency.ABSENT
    assert pool.residency("b") is Residency.RESIDENT


def test_nothing_is_evicted_while_there_is_room() -> None:
    pool = make_pool(pages=4)
    residents(pool, "a", "b")
    assert load(pool, "c", pages=2) is not None
    assert pool.counters.evictions == 0
    assert pool.num_resident == 3


def test_slots_are_a_limit_too() -> None:
    pool = make_pool(pages=8, slots=2)
    residents(pool, "a", "b", "c")
    assert pool.num_resident == 2
    assert pool.residency("a") is Residency.ABSENT
    assert pool.slot("b") != pool.slot("c")
    assert pool.acquire(["b", "c"])
    assert load(pool, "d") is None
    pool.check_integrity([["b", "c"]])


def test_wishes_begin_oldest_first_up_to_the_limit() -> None:
    pool = make_pool()
    for digest in "abcd":
        pool.want(digest)
    assert pool.take_wanted(2) == ["a", "b"]
    assert pool.take_wanted(2) == []
    assert pool.take_wanted(3) == ["c"]
    pool.fail("a")
    pool.fail("b")
    assert pool.take_wanted(2) == ["d"]
    assert pool.num_pending == 2


def test_urgent_wishes_begin_beyond_the_limit() -> None:
    pool = make_pool()
    for digest in "abcd":
        pool.want(digest)
    assert pool.take_wanted(1) == ["a"]
    assert pool.take_wanted(1, urgent={"c", "z"}) == ["c"]
    assert pool.take_wanted(1, urgent={"c"}) == []
    assert pool.take_wanted(4, urgent={"d"}) == ["d", "b"]


def test_a_wish_is_made_once() -> None:
    pool = make_pool()
    for _ in range(3):
        pool.want("a")
    assert pool.take_wanted(8) == ["a"]
    pool.want("a")
    assert pool.take_wanted(8) == []
    assert pool.place("a", [1]) is not None
    pool.want("a")
    assert pool.take_wanted(8) == []
    assert pool.counters.misses == 1


def test_a_failed_load_may_be_tried_again() -> None:
    pool = make_pool()
    pool.want("a")
    pool.take_wanted(1)
    pool.fail("a")
    assert pool.residency("a") is Residency.ABSENT
    assert pool.num_pending == 0
    residents(pool, "a")
    assert (pool.counters.failures, pool.counters.misses, pool.counters.loads) == (1, 2, 1)


def test_a_pin_loads_and_keeps_until_unpinned() -> None:
    pool = make_pool(pages=1)
    pool.pin("a")
    assert pool.pinned("a")
    assert pool.take_wanted(1) == ["a"]
    assert pool.place("a", [PAGE]) is not None
    assert load(pool, "b") is None
    pool.unpin("a")
    assert not pool.pinned("a")
    pool.unpin("never pinned")
    assert pool.place("b", [PAGE]) is not None
    assert pool.residency("a") is Residency.ABSENT


def test_counters() -> None:
    pool = make_pool(pages=2)
    residents(pool, "a", "b")
    assert pool.acquire(["a", "b"])
    pool.release(["a", "b"])
    residents(pool, "c")
    counters = pool.counters
    assert (counters.misses, counters.loads, counters.evictions, counters.failures) == (3, 3, 1, 0)


def test_releasing_what_is_not_held_is_an_error() -> None:
    pool = make_pool()
    residents(pool, "a")
    with pytest.raises(KeyError):
        pool.release(["a"])


def drop_reference(pool: AdapterPool) -> None:
    pool._references.clear()


def forget_adapter(pool: AdapterPool) -> None:
    del pool._resident["b"]


def lose_page(pool: AdapterPool) -> None:
    pool.allocator.take([page for page in range(4) if page in pool.allocator._free][:1])


def lose_slot(pool: AdapterPool) -> None:
    pool._free_slots.pop()


def share_page(pool: AdapterPool) -> None:
    pool._resident["b"] = Placement(pool.slot("b"), (0,), pool._resident["a"].pages)


def evict_used(pool: AdapterPool) -> None:
    pool._evict("a")


@pytest.mark.parametrize("damage", [drop_reference, forget_adapter, lose_page, lose_slot, share_page, evict_used])
def test_integrity_finds_damage(damage: Callable[[AdapterPool], None]) -> None:
    pool = make_pool()
    residents(pool, "a", "b")
    assert pool.acquire(["a"])
    pool.check_integrity([["a"]])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([["a"]])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_random_use_keeps_promises(data: st.DataObject) -> None:
    """Adapters in use or pinned stay where they are, and every placement lies apart from all others."""
    pool = make_pool(pages=data.draw(st.integers(1, 6)), slots=data.draw(st.integers(1, 5)))
    users: list[list[str]] = []
    digests = st.sampled_from("abcdef")
    for _ in range(data.draw(st.integers(1, 40))):
        fixed = {d: pool._resident[d] for d in {d for user in users for d in user}}
        action = data.draw(st.sampled_from(["load", "acquire", "release", "pin", "unpin"]))
        digest = data.draw(digests)
        if action == "load" and pool.residency(digest) is Residency.ABSENT:
            evictions, resident = pool.counters.evictions, pool.num_resident
            if load(pool, digest, data.draw(st.integers(1, 3))) is None:
                assert (pool.counters.evictions, pool.num_resident) == (evictions, resident)
                pool.fail(digest)
        elif action == "acquire":
            wanted = data.draw(st.lists(digests, max_size=3))
            if pool.acquire(wanted):
                users.append(wanted)
            for missing in pool.take_wanted(8):
                pool.fail(missing)
        elif action == "release" and users:
            pool.release(users.pop())
        elif action == "pin" and pool.residency(digest) is Residency.RESIDENT:
            pool.pin(digest)
        elif action == "unpin":
            pool.unpin(digest)
        assert all(pool._resident.get(d) == p for d, p in fixed.items() if any(d in user for user in users))
        assert all(pool.residency(d) is Residency.RESIDENT for d in "abcdef" if pool.pinned(d))
        pool.check_integrity(users)


def test_what_is_in_use_or_pinned_is_not_discarded() -> None:
    pool = make_pool()
    residents(pool, "used", "pinned", "free")
    assert pool.acquire(["used"])
    pool.pin("pinned")
    for digest in ("used", "pinned", "free"):
        pool.discard(digest)
    assert [pool.residency(digest) for digest in ("used", "pinned", "free")] == [
        Residency.RESIDENT,
        Residency.RESIDENT,
        Residency.ABSENT,
    ]
    assert pool.bytes_used == 2 * PAGE
    pool.check_integrity([["used"]])


def test_a_load_that_is_discarded_is_expected_no_more() -> None:
    pool = make_pool()
    pool.want("a")
    assert not pool.expects("a")
    pool.take_wanted(1)
    assert pool.expects("a")
    pool.discard("a")
    assert not pool.expects("a")
    assert (pool.residency("a"), pool.num_pending) == (Residency.ABSENT, 0)
