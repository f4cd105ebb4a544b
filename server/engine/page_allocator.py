"""Places blocks of bytes in pages of one flat buffer; no block straddles two pages unless it is larger than one."""

from collections.abc import Iterable, Sequence, Set

ALIGNMENT = 64  # as `kernels.segments.ALIGNMENT`; a test keeps the two equal, for this file stays torch-free


class PageAllocator:
    """Free pages of a buffer in pages of `page_bytes`, of which `num_pages` from page `first` on are the adapters' own.

    Small blocks share pages with other blocks of the same allocation; a block larger than a page takes a run of
    neighbouring pages. Pages are given back whole, so nothing needs compaction.
    """

    def __init__(self, num_pages: int, page_bytes: int, first: int = 0) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.first = first
        self._free = set(range(first, first + num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def fit(
        self, sizes: Sequence[int], more: Iterable[int] = (), without: Set[int] = frozenset()
    ) -> tuple[list[int], list[int]] | None:
        """Places for blocks of the given bytes: (byte offset of each block, pages needed), or None. Takes nothing.

        more: further pages that may be used, in order of preference, after the own ones; without: pages that may not.
        First fit, largest first: with blocks far smaller than a page less than a page is lost.
        """
        offsets = [0] * len(sizes)
        taken: list[int] = []
        open_pages: list[list[int]] = []  # [next free byte, end of page]
        free = dict.fromkeys(page for page in (*sorted(self._free), *more) if page not in without)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            size = -(-sizes[index] // ALIGNMENT) * ALIGNMENT
            page = next((page for page in open_pages if page[1] - page[0] >= size), None)
            if page is None:
                run = self._run(free, -(-size // self.page_bytes))
                if run is None:
                    return None
                for number in run:
                    del free[number]
                taken.extend(run)
                page = [run[0] * self.page_bytes, (run[-1] + 1) * self.page_bytes]
                open_pages.append(page)
            offsets[index] = page[0]
            page[0] += size
            if page[1] - page[0] < ALIGNMENT:
                open_pages.remove(page)
        return offsets, taken

    def take(self, pages: Iterable[int]) -> None:
        """Take own pages that `fit` has found."""
        for page in pages:
            self._free.remove(page)

    def release(self, pages: Sequence[int]) -> None:
        """Give own pages back."""
        if not self._free.isdisjoint(pages):
            raise AssertionError("a page was released twice")
        self._free.update(pages)

    def _run(self, free: dict[int, None], count: int) -> Sequence[int] | None:
        """`count` neighbouring pages: the first run among the own ones, else the last of all."""
        if count <= 1:
            return [first] if (first := next(iter(free), None)) is not None else None
        own = sorted(page for page in free if page >= self.first)
        return _first_run(own, count, 1) or _first_run(sorted(free, reverse=True), count, -1)


def _first_run(pages: Sequence[int], count: int, step: int) -> Sequence[int] | None:
    """The first `count` pages in a row, each `step` from the one before; in ascending order."""
    start = 0
    for place, page in enumerate(pages):
        if place and page != pages[place - 1] + step:
            start = place
        if place - start + 1 == count:
            return sorted(pages[start : place + 1])
    return None
