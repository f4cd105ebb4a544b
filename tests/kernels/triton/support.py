"""Steps for the kernels' tests, small because the interpreter takes milliseconds per program."""

from collections.abc import Sequence

import torch

from kernels.segments import Limits, Segments
from kernels.triton import lowrank
from kernels.triton.chunks import chunks_of
from tests.kernels.support import Adapter, Group, pack, segments_of
from tests.kernels.triton.interpreter import DEVICE

# Rows 0 and 2 take several adapters, slot 4 has a whole chunk of rows and a rest, row 24 is base.
GROUPS = [
    Group(0, [0], [0.5]),
    Group(1, [1, 0], [1.0, -0.75]),
    Group(2, [2, 22]),
    Group(3, [3, 2], [1.0, 2.0]),
    Group(4, range(4, 22)),
    Group(5, []),
    Group(5, [23, 0]),
]
ROWS = 25
UNIT = 5e-7  # error per square root of a sum's length, for results of about unit size; see also RTOL


def on_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def packed(adapters: Sequence[Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
    pool, records = pack(adapters)
    return pool.to(DEVICE), records.to(DEVICE)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    segments: Segments,
    *,
    fuse: bool | None = None,
    width: int = 256,
) -> torch.Tensor:
    """What the kernels make of a copy of y."""
    result = y.clone()
    lowrank.lowrank_group([result], x, pool, [records], chunks_of(segments, DEVICE, Limits(width)), fuse)
    return result


def on(segments: Segments) -> Segments:
    """Segments where the reference wants them."""
    slot, start, token, weight = on_device(segments.slot, segments.start, segments.token, segments.weight)
    return Segments(slot, start, token, weight)


def alone(row: int, groups: Sequence[Group]) -> Segments:
    """The same row in a step of its own, as row 0."""
    return segments_of(
        *(Group(g.slot, [0], [weight]) for g in groups for other, weight in g.weighted() if other == row)
    )
