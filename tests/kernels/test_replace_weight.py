"""C++ `replace_weight` against the reference."""

from collections.abc import Callable

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import FACTOR_DTYPES
from tests.kernels.support import Adapter, Group, close, lowrank_adapter, pack, replacement, segments_of, swapped

pytestmark = pytest.mark.usefixtures("native")

# Row 0 mixes two replacements and the base, row 4 an adapter without one; 9 and 11 are base.
GROUPS = [Group(0, [0, 1], [0.5, 1.0]), Group(1, [0, *range(2, 9)], [0.25] + [1.0] * 7), Group(2, [4, 10])]


@pytest.mark.parametrize("factor", [dtype for dtype in FACTOR_DTYPES if dtype.is_floating_point], ids=str)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 5e-7), (torch.bfloat16, 5e-7)], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(576, 431), (123, 1000), (17, 1), (1, 17)])
def test_matches_reference(dtype: torch.dtype, unit: float, factor: torch.dtype, inner: int, outer: int) -> None:
    atol = 2 * unit * inner**0.5
    adapters = [
        replacement(inner, outer, factor, bias=True),
        replacement(inner, outer, factor),
        lowrank_adapter(3, inner, outer, factor),
    ]
    pool, records = pack(adapters)
    x, y, segments = torch.randn(12, inner).to(dtype), torch.randn(12, outer).to(dtype), segments_of(*GROUPS)
    expected = reference.replace_weight(y.clone(), x, pool, records, segments)

    result = dispatch.replace_weight(y.clone(), x, pool, records, segments)

    assert result.dtype == dtype
    assert close(result, expected, atol)
    assert torch.equal(result[9:], y[9:])
    assert not close(dispatch.replace_weight(y.clone(), x, pool, records, swapped(segments)), expected, atol)


def test_weight_of_one_leaves_nothing_of_the_base_product() -> None:
    pool, records = pack([replacement(64, 123, torch.float32)])
    x, segments = torch.randn(1, 64), segments_of(Group(0, [0]))
    small = dispatch.replace_weight(torch.zeros(1, 123), x, pool, records, segments)
    for base in (1e9, torch.inf, torch.nan):
        assert torch.equal(dispatch.replace_weight(torch.full((1, 123), base), x, pool, records, segments), small)


@pytest.mark.parametrize("replace", [dispatch.replace_weight, reference.replace_weight])
def test_an_int8_weight_is_refused(replace: Callable[..., torch.Tensor]) -> None:
    weight = Adapter(weight=torch.ones(17, 5, dtype=torch.int8), dtype=torch.int8)
    with pytest.raises(ValueError, match="no scales"):
        replace(torch.zeros(1, 17), torch.zeros(1, 5), *pack([weight]), segments_of(Group(0, [0])))


def test_bits_of_a_row_depend_on_neither_batch_mates_nor_threads(threads: None) -> None:
    pool, records = pack([replacement(576, 1000, torch.bfloat16), replacement(576, 1000, torch.bfloat16)])
    x, y = torch.randn(7, 576), torch.randn(7, 1000)
    whole = dispatch.replace_weight(y.clone(), x, pool, records, segments_of(Group(0, range(6)), Group(1, [6])))
    torch.set_num_threads(1)
    for row in range(7):
        one = y[row : row + 1].clone()
        dispatch.replace_weight(one, x[row : row + 1], pool, records, segments_of(Group(int(row == 6), [0])))
        assert torch.equal(one[0], whole[row])
