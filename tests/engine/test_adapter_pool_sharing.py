"""Adapters beside the KV cache in one budget, and parts that several adapters have in common."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.adapter_pool import AdapterPool, Placement
from server.engine.block_pool import BlockPool
from server.engine.page_allocator import PageAllocator
from server.engine.status import Residency
from tests.engine.support import PAGE, load

BASIS = {b"basis": [PAGE, PAGE]}


def make_pool(kv: int = 2, between: int = 4, own: int = 2, slots: int = 8) -> AdapterPool:
    """Pages 0 to kv are the KV cache's, the last `own` the adapters', those between anybody's."""
    return AdapterPool(PageAllocator(own, PAGE, kv + between), slots, BlockPool(kv + between, 4, kv))


def bring(
    pool: AdapterPool, digest: str, pages: int = 1, shared: Mapping[bytes, Sequence[int]] | None = None
) -> Placement | None:
    pool.want(digest)
    pool.take_wanted(1, urgent={digest})
    return pool.place(digest, [PAGE] * pages, shared=shared or {})


def check(pool: AdapterPool) -> None:
    pool.check_integrity([])
    pool.blocks.check_integrity([])


class TestOneBudget:
    def test_own_pages_first_then_borrowed_ones_from_the_end(self) -> None:
        pool = make_pool()
        placement = load(pool, "a", pages=4)
        assert placement is not None
        assert placement.pages == (6, 7, 5, 4)
        assert pool.blocks.num_lent == 2
        assert pool.bytes_used == 4 * PAGE
        assert pool.device_bytes == 8 * PAGE
        check(pool)

    def test_what_the_kv_cache_is_sure_of_is_never_borrowed(self) -> None:
        pool = make_pool()
        assert load(pool, "a", pages=7) is None
        assert load(pool, "b", pages=6) is not None
        check(pool)

    def test_blocks_held_by_requests_are_not_borrowed(self) -> None:
        pool = make_pool()
        held = pool.blocks.allocate(5)
        assert held is not None
        assert load(pool, "a", pages=4) is None
        assert load(pool, "b", pages=3) is not None
        pool.blocks.check_integrity([held])

    def test_evicted_adapters_give_borrowed_blocks_back(self) -> None:
        pool = make_pool()
        assert load(pool, "a", pages=6)
        assert pool.blocks.num_free == 2
        pool.give_blocks(3)
        assert pool.residency("a") is Residency.ABSENT
        assert pool.blocks.num_free == 6
        check(pool)

    def test_adapters_in_their_own_pages_are_not_evicted_for_the_kv_cache(self) -> None:
        pool = make_pool()
        assert load(pool, "own", pages=2)
        assert load(pool, "borrows", pages=1)
        assert pool.num_returnable() == 1
        pool.give_blocks(6)
        assert pool.residency("own") is Residency.RESIDENT
        assert pool.residency("borrows") is Residency.ABSENT

    @pytest.mark.parametrize("how", ["reference", "pin", "keep", "bytes on their way"])
    def test_adapters_that_are_needed_stay(self, how: str) -> None:
        pool = make_pool()
        assert load(pool, "a", pages=6)
        if how == "reference":
            assert pool.acquire(["a"])
        elif how == "pin":
            pool.pin("a")
        elif how == "bytes on their way":
            pool.await_bytes("a")
        keep = {"a"} if how == "keep" else frozenset[str]()
        assert pool.num_returnable(keep) == 0
        pool.give_blocks(6, keep)
        assert "a" in pool._resident

    def test_no_more_than_needed_is_evicted_and_the_oldest_first(self) -> None:
        pool = make_pool(own=0)
        for digest in "abcd":
            pool.blocks.now += 1
            assert load(pool, digest)
        pool.give_blocks(4)
        assert [pool.residency(digest) for digest in "abcd"] == [Residency.ABSENT] * 2 + [Residency.RESIDENT] * 2

    def test_of_an_old_prefix_and_a_new_adapter_the_prefix_goes(self) -> None:
        pool = make_pool(kv=1, between=2, own=0)
        [block, _] = pool.blocks.allocate(2) or []
        pool.blocks.register(block, b"old")
        pool.blocks.release([block, 1])
        pool.blocks.now = 5
        assert load(pool, "new")
        pool.give_blocks(2)
        assert pool.residency("new") is Residency.RESIDENT

    def test_of_a_new_prefix_and_an_old_adapter_the_adapter_goes(self) -> None:
        pool = make_pool(kv=1, between=2, own=0)
        assert load(pool, "old")
        blocks = pool.blocks.allocate(2) or []
        for block, key in zip(blocks, [b"a", b"b"], strict=True):
            pool.blocks.register(block, key)
        pool.blocks.now = 5
        pool.blocks.release(blocks)
        pool.give_blocks(1)
        assert pool.residency("old") is Residency.ABSENT
        assert pool.blocks.match([b"a", b"b"]) == blocks

    def test_a_new_adapter_takes_old_prefixes_before_it_evicts_newer_adapters(self) -> None:
        pool = make_pool(kv=0, between=3, own=0)
        blocks = pool.blocks.allocate(1) or []
        pool.blocks.register(blocks[0], b"a")
        pool.blocks.release(blocks)
        pool.blocks.now = 5
        assert load(pool, "x", pages=2)
        assert load(pool, "y")
        assert pool.residency("x") is Residency.RESIDENT
        assert pool.blocks.match([b"a"]) == []

    def test_a_block_of_many_pages_finds_its_run_in_the_zone_of_the_adapters(self) -> None:
        pool = make_pool(kv=2, between=4, own=3)
        held = pool.blocks.allocate(6)
        assert held is not None
        pool.want("a")
        pool.take_wanted(1)
        placement = pool.place("a", [3 * PAGE])
        assert placement is not None
        assert placement.pages == (6, 7, 8)

    def test_a_failed_placement_changes_nothing(self) -> None:
        pool = make_pool()
        assert load(pool, "a", pages=3)
        assert pool.acquire(["a"])
        assert load(pool, "b", pages=2)
        before = dict(pool._resident)
        assert load(pool, "c", pages=4) is None
        assert dict(pool._resident) == before
        pool.check_integrity([["a"]])
        pool.blocks.check_integrity([])


class TestSharedParts:
    def test_a_part_is_placed_once_and_everybody_points_there(self) -> None:
        pool = make_pool()
        first, second = bring(pool, "a", 1, BASIS), bring(pool, "b", 1, BASIS)
        assert first is not None
        assert second is not None
        assert first.offsets[1:] == second.offsets[1:]
        assert first.offsets[0] != second.offsets[0]
        assert first.fresh == {b"basis"}
        assert not second.fresh
        assert pool.bytes_used == 4 * PAGE
        check(pool)

    def test_the_part_stays_for_the_last_user(self) -> None:
        pool = make_pool()
        bring(pool, "a", 1, BASIS)
        bring(pool, "b", 1, BASIS)
        pool.discard("a")
        assert pool.bytes_used == 3 * PAGE
        check(pool)
        pool.discard("b")
        assert pool.bytes_used == 0
        check(pool)

    def test_different_parts_lie_apart(self) -> None:
        pool = make_pool()
        first, second = bring(pool, "a", 1, {b"x": [PAGE]}), bring(pool, "b", 1, {b"y": [PAGE]})
        assert first is not None
        assert second is not None
        assert not set(first.offsets) & set(second.offsets)

    def test_a_part_that_leaves_with_the_evicted_is_placed_anew(self) -> None:
        """Evicting its only user frees the part: it must be written again, and is not thought to be there."""
        pool = make_pool(kv=0, between=0, own=3)
        bring(pool, "a", 1, BASIS)
        placement = bring(pool, "b", 1, BASIS)
        assert placement is not None
        assert placement.fresh == {b"basis"}
        assert pool.residency("a") is Residency.ABSENT
        check(pool)

    def test_evicting_one_of_two_users_makes_room_for_its_own_pages_only(self) -> None:
        pool = make_pool(kv=0, between=0, own=4)
        bring(pool, "a", 1, BASIS)
        bring(pool, "b", 1, BASIS)
        placement = bring(pool, "c", 1, BASIS)
        assert placement is not None
        assert placement.fresh == frozenset()
        assert (pool.residency("a"), pool.residency("b")) == (Residency.ABSENT, Residency.RESIDENT)
        check(pool)

    def test_users_out_of_step_are_found(self) -> None:
        pool = make_pool()
        bring(pool, "a", 1, BASIS)
        del pool._shared[b"basis"]
        with pytest.raises(AssertionError, match="shared"):
            pool.check_integrity([])


class TestDropAndArrival:
    def test_what_is_in_use_is_not_dropped(self) -> None:
        pool = make_pool()
        assert load(pool, "a")
        assert pool.acquire(["a"])
        pool.discard("a")
        pool.discard("never seen")
        assert pool.residency("a") is Residency.RESIDENT

    def test_an_adapter_is_used_once_its_bytes_are_there(self) -> None:
        pool = make_pool()
        assert load(pool, "a")
        pool.await_bytes("a")
        assert pool.residency("a") is Residency.LOADING
        assert not pool.acquire(["a"])
        assert pool.num_pending == 1
        assert pool.take_wanted(8) == [], "it is on its way already"
        pool.arrived("a")
        assert pool.acquire(["a"])
        assert pool.num_pending == 0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_random_use_of_one_budget(data: st.DataObject) -> None:
    """Requests and adapters take from each other; nothing overlaps, and what is used stays where it is."""
    kv, between, own = (data.draw(st.integers(0, 4)) for _ in range(3))
    pool = make_pool(kv, between, own, slots=data.draw(st.integers(1, 5)))
    tables: list[list[int]] = []
    users: list[list[str]] = []
    for serial in range(data.draw(st.integers(1, 40))):
        pool.blocks.now += 1
        fixed = {digest: pool._resident[digest] for user in users for digest in user}
        action = data.draw(st.sampled_from(["load", "blocks", "free", "use", "end"]))
        digest = data.draw(st.sampled_from("abcde"))
        if action == "load" and pool.residency(digest) is Residency.ABSENT:
            key = data.draw(st.sampled_from([b"", b"x", b"y"]))
            if bring(pool, digest, data.draw(st.integers(1, 2)), {key: [PAGE]} if key else {}) is None:
                pool.fail(digest)
        elif action == "blocks":
            count = data.draw(st.integers(1, 4))
            possible = pool.blocks.num_free + pool.num_returnable()
            pool.give_blocks(count)
            blocks = pool.blocks.allocate(count)
            assert (blocks is not None) == (count <= possible)
            if blocks:
                pool.blocks.register(blocks[0], b"prefix %d" % serial)
                tables.append(blocks)
        elif action == "free" and tables:
            pool.blocks.release(tables.pop())
        elif action == "use" and pool.residency(digest) is Residency.RESIDENT:
            assert pool.acquire([digest])
            users.append([digest])
        elif action == "end" and users:
            pool.release(users.pop())
        assert all(pool._resident[name] == where for name, where in fixed.items() if [name] in users)
        pool.check_integrity(users)
        pool.blocks.check_integrity(tables)


class TestEvictionsAreFew:
    def test_a_run_of_pages_evicts_only_who_lies_there(self) -> None:
        """Pages 0 to 7: the run of four is found once `c` and `d` are gone; `a`, older than both, lies elsewhere."""
        pool = make_pool(kv=0, between=0, own=8)
        for digest, pages in (("a", 1), ("pinned", 1), ("b", 2), ("c", 2), ("d", 2)):
            pool.blocks.now += 1
            assert load(pool, digest, pages)
        pool.pin("pinned")
        pool.want("large")
        pool.take_wanted(1)
        placement = pool.place("large", [4 * PAGE])
        assert placement is not None
        evicted = {digest for digest in "abcd" if pool.residency(digest) is Residency.ABSENT}
        assert evicted == {"b", "c"}
        assert placement.pages == (2, 3, 4, 5)
        check(pool)

    def test_a_slot_alone_costs_one_adapter(self) -> None:
        pool = make_pool(own=8, slots=3)
        for digest in "abc":
            assert load(pool, digest)
        assert load(pool, "d")
        assert [pool.residency(digest) for digest in "abc"] == [Residency.ABSENT] + [Residency.RESIDENT] * 2
        check(pool)

    def test_what_never_fits_is_known(self) -> None:
        pool = make_pool(kv=2, between=4, own=2)
        assert pool.can_ever_hold(6 * PAGE)
        assert not pool.can_ever_hold(6 * PAGE + 1)
