"""Places blocks of bytes in pages of one flat buffer; no block straddles two pages unless it is larger than one."""

from collections.abc import Sequence

ALIGNMENT = 64  # as `kernels.segments.ALIGNMENT`; a test keeps the two equal, for this file stays torch-free


class PageAllocator:
    """Free pages of a buffer of `num_pages * page_bytes` bytes.

    Small blocks share pages with other blocks of the same allocation; a block larger than a page takes a run of
    neighbouring pages. Pages are given back whole, so nothing needs compaction.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._free = set(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, sizes: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """Place blocks of the given bytes; (byte offset of each block, pages taken), or None if they do not fit.

        First fit, largest first: with blocks far smaller than a page less than a page is lost.
        """
        offsets = [0] * len(sizes)
        taken: list[int] = []
        open_pages: list[list[int]] = []  # [next free byte, end of page]
        free = set(self._free)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            size = -(-sizes[index] // ALIGNMENT) * ALIGNMENT
            page = next((page for page in open_pages if page[1] - page[0] >= size), None)
            if page is None:
                run = _run(free, -(-size // self.page_bytes))
                if run is None:
                    return None
                free.difference_update(run)
                taken.extend(run)
                page = [run[0] * self.page_bytes, (run[-1] + 1) * self.page_bytes]
                open_pages.append(page)
            offsets[index] = page[0]
            page[0] += size
        self._free = free
        return offsets, taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        if not self._free.isdisjoint(pages):
            raise AssertionError("a page was released twice")
        self._free.update(pages)

    def reclaim(self, pages: Sequence[int]) -> None:
        """Take back pages just released."""
        self._free.difference_update(pages)


def _run(free: set[int], count: int) -> range | None:
    """The lowest run of `count` neighbouring free pages."""
    if count <= 1:
        return range(first, first + 1) if (first := min(free, default=-1)) >= 0 else None
    start = previous = -2
    for page in sorted(free):
        if page != previous + 1:
            start = page
        previous = page
        if page - start + 1 == count:
            return range(start, page + 1)
    return None
