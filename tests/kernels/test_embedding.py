"""C++ `lowrank_embedding` against the reference."""

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import FACTOR_DTYPES
from tests.kernels.support import Group, close, lowrank_adapter, pack, segments_of, swapped

pytestmark = pytest.mark.usefixtures("native")

VOCABULARY = 431
GROUPS = [Group(0, [0], [0.5]), Group(1, [1, 0], [1.0, -0.75]), Group(2, range(2, 9)), Group(3, [10]), Group(1, [])]


@pytest.mark.parametrize("factor", FACTOR_DTYPES, ids=str)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str)
@pytest.mark.parametrize("outer", [576, 123, 1])
@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
def test_matches_reference(dtype: torch.dtype, unit: float, factor: torch.dtype, outer: int, core: bool) -> None:
    adapters = [
        lowrank_adapter(r, VOCABULARY, outer, factor, bias=r in (0, 3), embedding=True, core=core)
        for r in (3, 17, 64, 0)
    ]
    pool, records = pack(adapters)
    atol = unit * 64**0.5
    ids, y, segments = torch.randint(VOCABULARY, (12,)), torch.randn(12, outer).to(dtype), segments_of(*GROUPS)
    expected = reference.lowrank_embedding(y.clone(), ids, pool, records, segments)

    result = dispatch.lowrank_embedding(y.clone(), ids, pool, records, segments)

    assert result.dtype == dtype
    assert close(result, expected, atol)
    assert torch.equal(result[[9, 11]], y[[9, 11]])
    assert not close(dispatch.lowrank_embedding(y.clone(), ids, pool, records, swapped(segments, 1, 2)), expected, atol)


def test_bits_of_a_row_do_not_depend_on_batch_mates() -> None:
    pool, records = pack([lowrank_adapter(r, VOCABULARY, 123, torch.bfloat16, embedding=True) for r in (3, 17)])
    ids, y = torch.randint(VOCABULARY, (9,)), torch.randn(9, 123)
    whole = dispatch.lowrank_embedding(
        y.clone(), ids, pool, records, segments_of(Group(0, range(6)), Group(1, range(6, 9)))
    )
    for row in range(9):
        alone = segments_of(Group(int(row >= 6), [0]))
        one = dispatch.lowrank_embedding(y[row : row + 1].clone(), ids[row : row + 1], pool, records, alone)
        assert torch.equal(one[0], whole[row])


def test_an_id_beyond_the_pool_is_refused() -> None:
    pool, records = pack([lowrank_adapter(4, 10, 8, torch.float32, embedding=True)])
    with pytest.raises(ValueError, match="outside the pool"):
        dispatch.lowrank_embedding(torch.zeros(1, 8), torch.tensor([10**6]), pool, records, segments_of(Group(0, [0])))
    with pytest.raises(ValueError, match="-1 is negative"):
        dispatch.lowrank_embedding(torch.zeros(1, 8), torch.tensor([-1]), pool, records, segments_of(Group(0, [0])))
