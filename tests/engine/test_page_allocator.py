"""Placing blocks of bytes in pages: aligned, apart from each other, within a page where they fit one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import segments
from server.engine.page_allocator import ALIGNMENT, PageAllocator


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(allocator: PageAllocator, sizes: list[int]) -> tuple[list[int], list[int]] | None:
    """Fit and take."""
    placed = allocator.fit(sizes)
    if placed is not None:
        allocator.take(placed[1])
    return placed


def check(allocator: PageAllocator, sizes: list[int], offsets: list[int], pages: list[int]) -> None:
    """Every promise of `fit` about one result."""
    page_bytes = allocator.page_bytes
    assert len(offsets) == len(sizes)
    assert len(set(pages)) == len(pages)
    assert all(0 <= page < allocator.num_pages for page in pages)
    end = -1
    for offset, size in sorted(zip(offsets, sizes, strict=True)):
        assert offset % ALIGNMENT == 0
        assert offset >= end, "blocks overlap"
        end = offset + size
        used = set(range(offset // page_bytes, -(-end // page_bytes)))
        assert used <= set(pages), "a block lies outside the pages taken"
        assert len(used) <= max(1, -(-size // page_bytes)), "a block straddles more pages than it needs"


def test_alignment_is_that_of_the_kernels() -> None:
    assert ALIGNMENT == segments.ALIGNMENT


def test_small_blocks_share_a_page() -> None:
    allocator = PageAllocator(4, 256)
    placed = allocate(allocator, [64, 100, 1])
    assert placed is not None
    offsets, pages = placed
    check(allocator, [64, 100, 1], offsets, pages)
    assert len(pages) == 1
    assert allocator.num_free == 3


def test_a_block_that_does_not_fit_the_rest_of_a_page_begins_another() -> None:
    allocator = PageAllocator(2, 256)
    placed = allocate(allocator, [192, 128])
    assert placed is not None
    assert sorted(placed[0]) == [0, 256]


def test_a_large_block_takes_a_run_and_its_rest_is_used() -> None:
    allocator = PageAllocator(4, 128)
    placed = allocate(allocator, [64, 320])
    assert placed is not None
    offsets, pages = placed
    check(allocator, [64, 320], offsets, pages)
    assert len(pages) == 3


def test_a_run_needs_neighbours() -> None:
    allocator = PageAllocator(5, 64)
    held = {offset // 64: [page] for page in range(5) if (placed := allocate(allocator, [64])) for offset in placed[0]}
    assert sorted(held) == list(range(5))
    for page in (0, 2, 4):
        allocator.release(held[page])
    assert allocate(allocator, [128]) is None
    assert allocator.num_free == 3
    allocator.release(held[1])
    placed = allocate(allocator, [192])
    assert placed == ([0], [0, 1, 2])


def test_failure_leaves_everything_as_it_was() -> None:
    allocator = PageAllocator(3, 64)
    placed = allocate(allocator, [64])
    assert placed is not None
    assert allocate(allocator, [64, 64, 64]) is None
    assert allocator.num_free == 2
    both = allocate(allocator, [64, 64])
    assert both is not None
    assert not set(both[1]) & set(placed[1])


def test_nothing_to_place_takes_nothing() -> None:
    allocator = PageAllocator(1, 64)
    assert allocate(allocator, []) == ([], [])
    assert allocator.num_free == 1
    assert allocate(PageAllocator(0, 64), [1]) is None


def test_a_double_release_is_found() -> None:
    allocator = PageAllocator(3, 64)
    placed = allocate(allocator, [64, 64])
    assert placed is not None
    allocator.release(placed[1])
    assert allocator.num_free == 3
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(placed[1][:1])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_random_allocations_never_overlap(data: st.DataObject) -> None:
    page_bytes = data.draw(st.sampled_from([64, 128, 256, 448]))
    allocator = PageAllocator(data.draw(st.integers(0, 24)), page_bytes)
    live: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()) and live:
            allocator.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        sizes = data.draw(st.lists(st.integers(1, 3 * page_bytes), max_size=6))
        before = allocator.num_free
        placed = allocate(allocator, sizes)
        if placed is None:
            assert allocator.num_free == before
            assert sum(map(aligned, sizes)) > 0
        else:
            check(allocator, sizes, *placed)
            assert not {page for pages in live for page in pages} & set(placed[1]), "a page was given twice"
            assert before - allocator.num_free == len(placed[1])
            live.append(placed[1])
        assert allocator.num_free + sum(map(len, live)) == allocator.num_pages


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.sampled_from([64, 256]))
def test_blocks_of_whole_pages_waste_nothing(pages: list[int], page_bytes: int) -> None:
    """An empty buffer of exactly the bytes asked for holds them."""
    allocator = PageAllocator(sum(pages), page_bytes)
    sizes = [count * page_bytes for count in pages]
    placed = allocate(allocator, sizes)
    assert placed is not None
    check(allocator, sizes, *placed)
    assert allocator.num_free == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=40))
def test_small_blocks_lose_less_than_half(sizes: list[int]) -> None:
    """First fit, largest first: all pages but one are at least half full."""
    allocator = PageAllocator(len(sizes), 512)
    placed = allocate(allocator, sizes)
    assert placed is not None
    assert len(placed[1]) - 1 <= 2 * sum(map(aligned, sizes)) // 512
