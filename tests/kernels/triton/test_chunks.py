"""The chunk table: every entry once, rows of one list of adapters together, nothing beyond the capacity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.segments import Chunks, Segments
from kernels.triton.chunks import ROWS, ChunkTable, chunks_of, layout
from tests.kernels.support import Group, segments_of
from tests.kernels.triton.support import GROUPS


def contributions(chunks: Chunks) -> dict[int, list[tuple[int, float]]]:
    """What each row takes, in the order in which a kernel adds it up."""
    found: dict[int, list[tuple[int, float]]] = {}
    for first, rows, layers in chunks.table.tolist():
        assert rows <= ROWS
        for row in range(rows):
            at = [first + layer * rows + row for layer in range(layers)]
            assert len({int(chunks.token[i]) for i in at}) == 1
            token = int(chunks.token[first + row])
            assert token not in found, "a row in two chunks"
            found[token] = [(int(chunks.slot[i]), float(chunks.weight[i])) for i in at]
        for layer in range(layers):
            run = chunks.slot[first + layer * rows : first + (layer + 1) * rows]
            assert len(set(run.tolist())) == 1, "a program takes one adapter at a time"
    return found


def expected(segments: Segments) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    for index, slot in enumerate(segments.slot.tolist()):
        for entry in range(int(segments.start[index]), int(segments.start[index + 1])):
            found.setdefault(int(segments.token[entry]), []).append((slot, float(segments.weight[entry])))
    return found


def test_a_row_has_its_adapters_in_segment_order() -> None:
    segments = segments_of(*GROUPS)
    chunks = chunks_of(segments, "cpu")
    assert contributions(chunks) == expected(segments)
    assert contributions(chunks)[0] == [(0, 0.5), (1, -0.75), (5, 1.0)]


def test_rows_of_one_adapter_share_chunks_of_sixteen() -> None:
    chunks = chunks_of(segments_of(Group(3, range(40)), Group(1, [40])), "cpu")
    assert chunks.table.tolist() == [[0, 16, 1], [16, 16, 1], [32, 8, 1], [40, 1, 1]]


def test_rows_of_one_composition_share_a_chunk() -> None:
    chunks = chunks_of(segments_of(Group(0, range(5)), Group(1, range(5)), Group(2, [4])), "cpu")
    assert chunks.table.tolist() == [[0, 4, 2], [8, 1, 3]]
    assert chunks.slot.tolist() == [0] * 4 + [1] * 4 + [0, 1, 2]


def laid_out_one_by_one(segments: Segments) -> tuple[list[list[int]], list[int]]:
    """What `layout` gives, chunk by chunk: runs of a segment's lone rows first, then each list of adapters."""
    lengths = segments.start.diff().tolist()
    segment = [index for index, length in enumerate(lengths) for _ in range(length)]
    entries: dict[int, list[int]] = {}
    for entry, token in enumerate(segments.token.tolist()):
        entries.setdefault(token, []).append(entry)
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for own in sorted((own for own in entries.values() if len(own) == 1), key=lambda own: own[0]):
        groups.setdefault(("alone", segment[own[0]]), []).append(own)
    for own in entries.values():
        if len(own) > 1:
            groups.setdefault(tuple(int(segments.slot[segment[entry]]) for entry in own), []).append(own)
    table, order = [], list[int]()
    for members in groups.values():
        for start in range(0, len(members), ROWS):
            piece = members[start : start + ROWS]
            table.append([len(order), len(piece), len(piece[0])])
            order += [own[layer] for layer in range(len(piece[0])) for own in piece]
    return table, order


GROUP = st.builds(Group, st.integers(0, 4), st.lists(st.integers(0, 40), max_size=30), st.just(()))
LONE = st.tuples(st.integers(0, 4), st.integers(0, 50))


def apart(counts: list[tuple[int, int]]) -> list[Group]:
    """Groups of so many rows for so many slots, no row in two of them."""
    ends = np.cumsum([count for _, count in counts]).tolist()
    return [Group(slot, range(end - count, end)) for (slot, count), end in zip(counts, ends, strict=True)]


@settings(deadline=None)
@given(st.lists(GROUP, max_size=6))
def test_any_step_is_covered(groups: list[Group]) -> None:
    segments = segments_of(*groups)
    chunks = chunks_of(segments, "cpu")
    assert contributions(chunks) == expected(segments)


@settings(deadline=None)
@given(st.one_of(st.lists(GROUP, max_size=6), st.lists(LONE, max_size=6).map(apart)))
def test_chunks_and_entries_stand_in_a_fixed_order(groups: list[Group]) -> None:
    segments = segments_of(*groups)
    table, order = layout(segments)
    assert (table.tolist(), order.tolist()) == laid_out_one_by_one(segments)
    assert {table.dtype, order.dtype} == {np.dtype(np.int64)}
    assert table.shape == (len(table), 3)


def test_a_table_is_filled_again_at_the_same_address() -> None:
    table = ChunkTable(max_entries=64, max_chunks=8, device="cpu")
    first = table.fill(segments_of(*GROUPS))
    addresses = [t.data_ptr() for t in (first.table, first.slot, first.token, first.weight)]
    small = segments_of(Group(2, [7]))
    again = table.fill(small)
    assert [t.data_ptr() for t in (again.table, again.slot, again.token, again.weight)] == addresses
    assert contributions(again) == expected(small)
    assert again.table.tolist() == [[0, 1, 1]] + [[0, 0, 0]] * 7
    assert again.slot.tolist() == [2] + [-1] * 63


@pytest.mark.parametrize(("entries", "chunks"), [(64, 4), (20, 8)])
def test_a_step_that_does_not_fit_leaves_the_table_alone(entries: int, chunks: int) -> None:
    table = ChunkTable(entries, chunks, "cpu")
    table.fill(segments_of(Group(1, [0])))
    before = table.chunks.table.clone()
    with pytest.raises(ValueError, match="chunks of 27 entries"):
        table.fill(segments_of(*GROUPS))
    assert torch.equal(table.chunks.table, before)
