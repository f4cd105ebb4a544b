"""Segments at fixed addresses are the same step to every kernel."""

import pytest
import torch

from kernels import dispatch, reference
from kernels.fixed_segments import FixedSegments
from kernels.segments import Limits, Segments
from tests.kernels.support import Group, close, lowrank_adapter, pack, segments_of

STEPS = [
    segments_of(Group(0, [0, 3]), Group(1, [0], [-0.5]), Group(2, [4])),
    segments_of(Group(2, [1])),
    segments_of(Group(0, []), Group(1, [2, 3]), Group(2, []), Group(0, [2])),
]


@pytest.mark.parametrize("step", STEPS, ids=["mixed", "one", "with empty ones"])
def test_a_filled_step_is_that_step(step: Segments, native: None) -> None:
    fixed = dispatch.fixed(6, "cpu", Limits())
    pool, records = pack([lowrank_adapter(r, 8, 6, torch.float32) for r in (4, 3, 5)])
    y, x = torch.randn(5, 6), torch.randn(5, 8)
    for segments in (*STEPS, step):
        fixed.fill(segments)
    expected = reference.lowrank(y.clone(), x, pool, records, step)
    for lowrank in (dispatch.lowrank, reference.lowrank):
        assert close(lowrank(y.clone(), x, pool, records, fixed.segments), expected, 1e-5)
    assert not close(y, expected, 1e-5)


def test_chunks_have_the_limits_and_the_addresses_of_the_first_step() -> None:
    fixed = FixedSegments(6, "cpu", Limits(width=300, factors=7), with_chunks=True)
    chunks = fixed.segments.chunks
    assert chunks is not None
    assert chunks.limits == Limits(300, 7)
    for step in STEPS:
        fixed.fill(step)
        assert int(chunks.table[:, 1].sum()) == len(set(step.token.tolist()))
    assert fixed.segments.chunks is chunks


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="4 entries; 3 fit"):
        dispatch.fixed(3, "cpu", Limits()).fill(STEPS[0])
