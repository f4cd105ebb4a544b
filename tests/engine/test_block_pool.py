"""Accounting of KV blocks: references, the free list, and the prefix cache."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.block_pool import BlockPool


def allocated(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def test_allocates_distinct_blocks_until_none_is_left() -> None:
    pool = BlockPool(5, 4)
    first, second = allocated(pool, 3), allocated(pool, 2)
    assert sorted(first + second) == list(range(5))
    assert pool.num_free == 0
    assert pool.allocate(1) is None
    pool.check_integrity([first, second])


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(3, 4)
    held = allocated(pool, 1)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    pool.check_integrity([held])


def test_reach_is_the_last_block_that_was_ever_allocated() -> None:
    pool = BlockPool(6, 4, shared_from=4)
    assert pool.reach == 0
    held = allocated(pool, 3)
    pool.release(held)
    pool.lend(pool.lendable())
    assert pool.reach == 3, "neither what is free again nor what the adapters have counts"
    allocated(pool, 4)
    assert pool.reach == 4


def test_an_allocation_of_none_is_empty() -> None:
    pool = BlockPool(1, 4)
    assert pool.allocate(0) == []
    assert pool.num_free == 1


def test_a_shared_block_is_free_when_the_last_reference_is_gone() -> None:
    pool = BlockPool(2, 4)
    block = allocated(pool, 1)
    pool.acquire(block)
    pool.release(block)
    assert pool.num_free == 1
    pool.check_integrity([block])
    pool.release(block)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_match_is_the_longest_known_prefix() -> None:
    pool = BlockPool(4, 4)
    blocks = allocated(pool, 3)
    for block, key in zip(blocks, [b"a", b"b", b"c"], strict=True):
        pool.register(block, key)
    assert pool.match([b"a", b"b", b"c", b"d"]) == blocks
    assert pool.match([b"a", b"x", b"c"]) == blocks[:1]
    assert pool.match([b"x", b"b"]) == []
    assert pool.match([]) == []


def test_a_released_block_keeps_its_prefix_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2, 4)
    block = allocated(pool, 1)
    pool.register(block[0], b"a")
    pool.release(block)
    assert pool.match([b"a"]) == block

    other = allocated(pool, 1)  # the block that was never used goes first
    assert other != block
    assert pool.match([b"a"]) == block
    assert allocated(pool, 1) == block
    assert pool.match([b"a"]) == []
    pool.check_integrity([other, block])


def test_a_prefix_hit_brings_a_free_block_back() -> None:
    pool = BlockPool(2, 4)
    block = allocated(pool, 1)
    pool.register(block[0], b"a")
    pool.release(block)
    pool.acquire(pool.match([b"a"]))
    assert pool.num_free == 1
    pool.check_integrity([block])
    assert allocated(pool, 1) != block


def test_free_without_counts_only_blocks_that_are_free_now() -> None:
    pool = BlockPool(4, 4)
    held, freed = allocated(pool, 1), allocated(pool, 2)
    pool.release(freed)
    assert pool.num_free_without([]) == 3
    assert pool.num_free_without(held) == 3
    assert pool.num_free_without(held + freed) == 1


def test_tails_are_handed_out_before_heads_and_old_before_new() -> None:
    pool = BlockPool(6, 4)
    old, new = allocated(pool, 3), allocated(pool, 3)
    pool.release(old)
    pool.release(new)
    assert allocated(pool, 6) == [*reversed(old), *reversed(new)]


def test_the_first_block_with_a_prefix_wins() -> None:
    pool = BlockPool(2, 4)
    first, second = allocated(pool, 2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    pool.register(first, b"b")
    assert pool.match([b"a"]) == [first]
    assert pool.match([b"b"]) == []
    pool.check_integrity([[first, second]])


def leak(pool: BlockPool) -> None:
    pool.allocate(1)


def lose(pool: BlockPool) -> None:
    pool._blank.popitem()


def forge(pool: BlockPool) -> None:
    pool._block_of[b"x"] = 0


@pytest.mark.parametrize(("damage", "tables"), [(leak, []), (lose, []), (forge, []), (lambda pool: None, [[0]])])
def test_integrity_finds_damage(damage: Callable[[BlockPool], None], tables: list[list[int]]) -> None:
    pool = BlockPool(3, 4)
    pool.check_integrity([])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


def test_releasing_more_than_is_held_is_found() -> None:
    pool = BlockPool(2, 4)
    block = allocated(pool, 1)
    pool.release(block)
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_use_never_hands_out_a_held_block(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(1, 8)), 4)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}  # what each block really holds
    for serial in range(data.draw(st.integers(1, 40))):
        keys = [b"k%d" % n for n in range(data.draw(st.integers(0, 4)))]
        if data.draw(st.booleans()) and tables:
            pool.release(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        else:
            hit = pool.match(keys)
            assert [content[block] for block in hit] == keys[: len(hit)], "a hit on a block with other content"
            free = pool.num_free_without(hit)
            pool.acquire(hit)
            assert pool.num_free == free
            fresh = pool.allocate(len(keys) - len(hit) + 1)
            if fresh is None:
                pool.release(hit)
            else:
                assert not any(block in table for table in tables for block in fresh)
                for block, key in zip(fresh, [*keys[len(hit) :], b"tail%d" % serial], strict=True):
                    content[block] = key
                    pool.register(block, key)
                tables.append(hit + fresh)
        pool.check_integrity(tables)


def cached(pool: BlockPool, *keys: bytes) -> list[int]:
    """A free block for each prefix, freed in this order, a step apart."""
    blocks = []
    for key in keys:
        [block] = allocated(pool, 1)
        pool.register(block, key)
        blocks.append(block)
    for block in blocks:
        pool.now += 1
        pool.release([block])
    return blocks


class TestLending:
    def test_only_free_blocks_of_the_shared_zone_are_lent_from_the_end(self) -> None:
        pool = BlockPool(6, 4, shared_from=2)
        held = allocated(pool, 3)  # 0, 1 and 2
        assert pool.lendable() == [5, 4, 3]
        pool.lend([5, 4])
        assert (pool.num_lent, pool.num_free) == (2, 1)
        pool.check_integrity([held])
        assert pool.allocate(2) is None, "lent blocks are not the KV cache's"
        pool.give_back([4])
        assert (pool.num_lent, pool.num_free) == (1, 2)
        assert sorted(allocated(pool, 2)) == [3, 4]

    def test_nothing_is_shared_unless_said(self) -> None:
        assert BlockPool(4, 4).lendable() == []

    def test_blocks_without_a_prefix_are_lent_before_old_prefixes_and_those_before_new_ones(self) -> None:
        pool = BlockPool(4, 4, shared_from=0)
        old, new = cached(pool, b"a", b"b")
        assert pool.lendable() == [3, 2, old, new]
        assert pool.lendable(before=2) == [3, 2, old]
        assert pool.lendable(before=1) == [3, 2]

    def test_a_lent_block_has_lost_its_prefix(self) -> None:
        pool = BlockPool(2, 4, shared_from=0)
        [block] = cached(pool, b"a")
        pool.lend([block])
        assert pool.match([b"a"]) == []
        pool.give_back([block])
        assert pool.match([b"a"]) == []
        pool.check_integrity([])

    def test_a_held_block_cannot_be_lent(self) -> None:
        pool = BlockPool(2, 4, shared_from=0)
        held = allocated(pool, 1)
        with pytest.raises(KeyError):
            pool.lend(held)

    def test_forgets_is_the_age_of_the_youngest_prefix_given_up(self) -> None:
        pool = BlockPool(4, 4, shared_from=0)
        cached(pool, b"a", b"b")
        assert [pool.forgets(count) for count in range(6)] == [-1, -1, -1, 1, 2, float("inf")]

    def test_a_block_lent_twice_is_found(self) -> None:
        pool = BlockPool(3, 4, shared_from=0)
        pool.lend([2])
        pool._blank[2] = None
        with pytest.raises(AssertionError):
            pool.check_integrity([])
