"""One call of several int8 products and their adapters: the bits of the calls that it stands for."""

import pytest
import torch

from kernels import dispatch
from kernels.segments import Field, Segments
from tests.kernels.support import Group, lowrank_adapter, pack, segments_of, swapped

pytestmark = pytest.mark.usefixtures("native")

RANKS = (1, 8, 17, 64, 0)
INNER = 123
# Rows 0 and 2 take several adapters, slot 3 has more rows than a tile, row 19 is base.
GROUPS = [Group(0, [0], [0.5]), Group(1, [1, 0], [1.0, -0.75]), Group(2, [2]), Group(3, range(3, 19)), Group(4, [2])]
ALONE = [Group(0, [0]), Group(2, [1, 2]), Group(3, range(3, 19))]  # every row once
ROWS = 20
# Slots 1 and 3 have rows for more than three tiles; row 0 and rows 40 to 44 take two.
MANY = [Group(0, [99, 0]), Group(1, range(45), [0.5] * 45), Group(2, [45]), Group(3, range(40, 98)), Group(4, [98])]

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def weight_of(outputs: int, *, bias: bool) -> Weight:
    values = torch.randint(-127, 128, (outputs, INNER), dtype=torch.int8)
    return dispatch.int8_pack(values), torch.rand(outputs) / 127, torch.randn(outputs) if bias else None


def together(
    x: torch.Tensor, weights: list[Weight], pool: torch.Tensor | None, records: list[torch.Tensor], segments: Segments
) -> torch.Tensor:
    missing = [None] * (3 - len(weights))
    step = (segments.slot, segments.start, segments.token, segments.weight) if pool is not None else (None,) * 4
    tables = [*records, *missing] if pool is not None else [None] * 3
    y: torch.Tensor = torch.ops.polyrank.int8_linears(
        x, *(part for weight in weights for part in weight), *missing * 3, pool, *tables, *step
    )
    return y


def one_by_one(
    x: torch.Tensor, weights: list[Weight], pool: torch.Tensor | None, records: list[torch.Tensor], segments: Segments
) -> torch.Tensor:
    ys = [dispatch.int8_linear(x, *weight) for weight in weights]
    if pool is not None:
        for y, own in zip(ys, records, strict=True):
            dispatch.lowrank(y, x, pool, own, segments)
    return torch.cat(ys, dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("groups", [[], ALONE, GROUPS, MANY], ids=["base", "one adapter a row", "several", "many"])
@pytest.mark.parametrize("outputs", [(50,), (192, 33), (576, 1, 97)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_single_calls(
    dtype: torch.dtype, outputs: tuple[int, ...], groups: list[Group], threads: int
) -> None:
    weights = [weight_of(out, bias=number % 2 == 0) for number, out in enumerate(outputs)]
    types: tuple[torch.dtype | str, ...] = (torch.bfloat16, "int4", torch.int8)
    pools = [
        pack([lowrank_adapter(r, INNER, out, factor, bias=r % 2 == 1 or r == 0, core=r > 8) for r in RANKS])
        for out, factor in zip(outputs, types, strict=False)
    ]
    sizes = [pool.numel() for pool, _ in pools]
    pool = torch.cat([pool for pool, _ in pools])
    tables = []
    for number, (_, own) in enumerate(pools):  # blocks of one pool: offsets move by what lies before
        moved = own.clone()
        for column in (Field.A, Field.B, Field.D, Field.BIAS, Field.CORE):
            moved[:, column] = torch.where(own[:, column] >= 0, own[:, column] + sum(sizes[:number]), own[:, column])
        tables.append(moved)
    rows = 100 if groups is MANY else ROWS
    x, segments = torch.randn(rows, INNER).to(dtype), segments_of(*groups)
    given = pool if groups else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = one_by_one(x, weights, given, tables, segments)
        found = together(x, weights, given, tables, segments)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    if groups:
        assert not torch.equal(together(x, weights, given, tables, swapped(segments, 0, 1)), expected)


def test_strided_and_empty_rows() -> None:
    weights = [weight_of(30, bias=True), weight_of(7, bias=False)]
    wide = torch.randn(6, 2 * INNER)
    for x in (wide[:, :INNER], wide[::2, INNER:], wide[:, ::2], torch.empty(0, INNER)):
        assert torch.equal(
            together(x, weights, None, [], segments_of()), one_by_one(x, weights, None, [], segments_of())
        )


def test_what_does_not_belong_together_is_refused() -> None:
    weight, x = weight_of(30, bias=False), torch.randn(3, INNER)
    pool, records = pack([lowrank_adapter(4, INNER, 30, torch.float32)])
    segments = segments_of(Group(0, [0]))
    op, nothing = torch.ops.polyrank.int8_linears, (None,) * 8
    step = (segments.slot, segments.start, segments.token, segments.weight)
    for arguments, words in (
        ((x, *weight, weight[0], None, None, None, None, None, *nothing), "needs a scale"),
        ((x, *weight, None, None, None, *weight, *nothing), "a third a second"),
        ((x[:, 4:], *weight, *(None,) * 6, *nothing), "do not fit"),
        ((x, *weight, *(None,) * 6, pool, None, None, None, *step), "no records"),
        ((x, *weight, *(None,) * 6, pool, records, None, None, *(None,) * 4), "without segments"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*arguments)


def test_shapes_are_known_without_running() -> None:
    weights = [weight_of(30, bias=True), weight_of(7, bias=False)]
    flat = [part for weight in weights for part in weight]
    arguments = (torch.randn(5, INNER), *flat, *(None,) * 3, *(None,) * 8)
    torch.library.opcheck(torch.ops.polyrank.int8_linears.default, arguments)
