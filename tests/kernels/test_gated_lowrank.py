"""C++ `gated_lowrank` against the reference: types, ranks, both ways to expand, ties, counts, and the bits of a row."""

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import FACTOR_DTYPES, GateField, Segments
from tests.kernels.gated import Gated, Spec, gated
from tests.kernels.support import FACTORS, Group, by_threads, close, row_alone, segments_of, swapped

pytestmark = pytest.mark.usefixtures("native")

# A usual gate, one that takes many ranks, shared router rows, none; every rank, odd numbers, one rank, many, one row.
SPECS = [
    Spec(64, 64, 8),
    Spec(16, 16, 7),
    Spec(18, 9, 5),
    Spec(24, 0, 0),
    Spec(7, 7, 7),
    Spec(33, 11, 8),
    Spec(1, 1, 1),
    Spec(129, 129, 3),
    Spec(40, 1, 39),
]
# Rows 0 and 2 take several adapters, slot 0 stands there with 1, 13 and 40 rows, the last row is base.
GROUPS = [
    Group(0, [0], [0.5]),
    Group(1, [1, 0], [1.0, -0.75]),
    Group(2, [2]),
    Group(3, [3, 4, 0]),
    Group(4, [5, 2, 6], [1.0, 2.0, 0.3]),
    Group(0, range(7, 20)),
    Group(5, [20, 21]),
    Group(6, [22, 0]),
    Group(7, range(23, 29)),
    Group(8, [29]),
    Group(0, range(30, 70)),
    Group(1, range(70, 90)),
]
ROWS = 91


def run(world: Gated, x: torch.Tensor, y: torch.Tensor, segments: Segments) -> torch.Tensor:
    return dispatch.gated_lowrank(y.clone(), x, world.pool, world.records, world.gates, segments)


def expected_of(world: Gated, x: torch.Tensor, y: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Into a pool of its own: the reference counts too."""
    return reference.gated_lowrank(y.clone(), x, world.pool.clone(), world.records, world.gates, segments)


@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(576, 192), (123, 431), (17, 1), (1, 17)])
def test_matches_reference(
    dtype: torch.dtype, factor: torch.dtype | str, router: torch.dtype, inner: int, outer: int
) -> None:
    world = gated(inner, outer, SPECS, factor, router, offset=True)
    x, y = torch.randn(ROWS, inner).to(dtype), torch.randn(ROWS, outer).to(dtype)
    segments = segments_of(*GROUPS)
    expected = expected_of(world, x, y, segments)
    atol = 5e-7 * (inner + 129) ** 0.5 * 4  # gates are up to k, so are sums

    result = run(world, x, y, segments)

    assert close(result, expected, atol)
    assert torch.equal(result[-1], y[-1])
    assert not close(run(world, x, y, swapped(segments, 0, 1)), expected, atol)
    ungated = reference.lowrank(y.clone(), x, world.pool, world.records, segments)
    assert not close(result, ungated, atol), "no gate at all"


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
@pytest.mark.parametrize("bias", [False, True], ids=["scores", "biased"])
def test_cores_and_biases(core: bool, bias: bool) -> None:
    world = gated(96, 80, SPECS, torch.bfloat16, bias=bias, core=core)
    x, y, segments = torch.randn(ROWS, 96), torch.randn(ROWS, 80), segments_of(*GROUPS)
    expected = expected_of(world, x, y, segments)
    assert close(run(world, x, y, segments), expected, 5e-5)
    if bias:
        world.gates[:, GateField.BIAS] = -1
        assert not close(run(world, x, y, segments), expected, 5e-5)


def test_every_rank_and_a_router_of_zeros_is_a_lora_with_alpha_over_r() -> None:
    """Equal scores share k = r equally: a factor of 1 each."""
    world = gated(64, 48, [Spec(12, 12, 12), Spec(12, 12, 11)], torch.float32, bias=False)
    for slot in range(2):
        world.block(slot, GateField.ROUTER, 12 * 64).zero_()
    x, y, segments = torch.randn(5, 64), torch.randn(5, 48), segments_of(Group(0, range(5)))
    plain = dispatch.lowrank(y.clone(), x, world.pool, world.records, segments)
    assert torch.equal(run(world, x, y, segments), plain)
    assert not close(run(world, x, y, swapped(segments)), plain, 1e-3)


def test_equal_scores_go_to_the_lower_rank() -> None:
    """Three ranks share a row of the router, without a bias; 4 of 12 are taken: one row whole, one of the next."""
    world = gated(32, 40, [Spec(12, 4, 4)], torch.float32, bias=False)
    x, y, segments = torch.randn(50, 32), torch.zeros(50, 40), segments_of(Group(0, range(50)))
    assert close(run(world, x, y, segments), expected_of(world, x, y, segments), 5e-5)
    counts = world.counts(0)
    assert sum(counts) == 200
    assert sum(counts[first] for first in (0, 3, 6, 9)) == 100
    assert counts[1::3] == counts[2::3]


def test_a_bias_changes_the_choice_and_the_share() -> None:
    world = gated(32, 40, [Spec(8, 8, 2)], torch.float32)
    x, y, segments = torch.randn(9, 32), torch.zeros(9, 40), segments_of(Group(0, range(9)))
    bias = world.block(0, GateField.BIAS, 8)
    bias.zero_()
    for rank, other in ((5, 2), (2, 5)):
        before = world.counts(0)
        bias[rank], bias[other] = 2.0, 0.0
        assert close(run(world, x, y, segments), expected_of(world, x, y, segments), 5e-5)
        assert world.counts(0)[rank] - before[rank] == 9
        assert world.counts(0)[other] - before[other] < 9


def test_a_row_of_nan_stays_alone() -> None:
    world = gated(96, 80, SPECS, torch.bfloat16)
    x, y, segments = torch.randn(ROWS, 96), torch.randn(ROWS, 80), segments_of(*GROUPS)
    whole = run(world, x, y, segments)
    x[35] = torch.nan
    x[36, 3] = torch.inf
    result = run(world, x, y, segments)
    assert bool(result[35].isnan().all())
    assert not bool(result[36].isfinite().all())
    kept = [row for row in range(ROWS) if row not in (35, 36)]
    assert torch.equal(result[kept], whole[kept])


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.int8, "int4"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_batch_mates(dtype: torch.dtype, factor: torch.dtype | str) -> None:
    """Alone a row is gathered, among many it is masked (`gathers` in gate.h): both must give the same bits."""
    world = gated(576, 431, SPECS, factor, offset=True)
    x, y = torch.randn(ROWS, 576).to(dtype), torch.randn(ROWS, 431).to(dtype)
    whole = run(world, x, y, segments_of(*GROUPS))
    for row in range(ROWS):
        alone = row_alone(GROUPS, row)
        one = run(world, x[row : row + 1], y[row : row + 1], alone)
        assert torch.equal(one[0], whole[row]), row


@pytest.mark.parametrize("shared", [False, True])
def test_bits_and_counts_do_not_depend_on_the_number_of_threads(shared: bool, threads: None) -> None:
    world = gated(576, 1536, SPECS, torch.bfloat16)
    groups = [Group(0, range(40)), Group(1, [40, 41]), Group(2, range(42, 90)), Group(0, [90, 0] if shared else [90])]
    x, y, segments = torch.randn(ROWS, 576), torch.randn(ROWS, 1536), segments_of(*groups)

    def counted() -> tuple[torch.Tensor, list[int]]:
        before = world.counts(0)
        result = run(world, x, y, segments)
        return result, [now - then for now, then in zip(world.counts(0), before, strict=True)]

    results, counts = zip(*by_threads(counted), strict=True)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert counts[0] == counts[1] == counts[2]


def test_counts_are_the_references() -> None:
    world = gated(96, 80, SPECS, torch.bfloat16)
    x, y, segments = torch.randn(ROWS, 96), torch.randn(ROWS, 80), segments_of(*GROUPS)
    theirs = Gated(world.pool.clone(), world.records, world.gates)
    before = world.pool.clone()
    run(world, x, y, segments)
    reference.gated_lowrank(y.clone(), x, theirs.pool, theirs.records, theirs.gates, segments)
    assert torch.equal(world.pool, theirs.pool)
    for slot, spec in enumerate(SPECS):
        if spec.rows:
            entries = sum(len(group.rows) for group in GROUPS if group.slot == slot)
            assert sum(world.counts(slot)) == entries * spec.active
            first = int(world.gates[slot, GateField.COUNTS])
            before[first : first + 8 * spec.rank] = world.pool[first : first + 8 * spec.rank]
    assert torch.equal(world.pool, before), "wrote outside of the counts"


def test_without_counts_the_pool_is_only_read() -> None:
    world = gated(96, 80, SPECS, torch.bfloat16, counts=False)
    before = world.pool.clone()
    run(world, torch.randn(ROWS, 96), torch.randn(ROWS, 80), segments_of(*GROUPS))
    assert torch.equal(world.pool, before)


def test_without_any_gate_it_is_lowrank() -> None:
    world = gated(96, 80, [Spec(8, 0, 0), Spec(17, 0, 0)], torch.bfloat16, offset=True)
    x, y, segments = torch.randn(9, 96), torch.randn(9, 80), segments_of(Group(0, range(4)), Group(1, range(3, 9)))
    assert torch.equal(run(world, x, y, segments), dispatch.lowrank(y, x, world.pool, world.records, segments))


@pytest.mark.parametrize("native_kernels", [True, False], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (GateField.RANK, 5, "a gate of rank 5"),
        (GateField.ROWS, 3, "3 router rows"),
        (GateField.ROWS, -1, "-1 router rows"),
        (GateField.ACTIVE, 9, "9 active ranks"),
        (GateField.ACTIVE, 0, "0 active ranks"),
        (GateField.DTYPE, FACTOR_DTYPES.index(torch.int8), "router type 3"),
        (GateField.DTYPE, -1, "router type -1"),
        (GateField.ROUTER, 1 << 40, "ROUTER"),
        (GateField.ROUTER, -1, "ROUTER"),
        (GateField.BIAS, 1 << 40, "gate BIAS"),
        (GateField.COUNTS, 1 << 40, "COUNTS"),
        (GateField.COUNTS, 12, "not aligned"),
    ],
    ids=str,
)
def test_a_wrong_gate_is_refused(
    column: GateField, value: int, said: str, native_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_kernels:
        monkeypatch.setattr(dispatch, "_cpu_loaded", False)
    world = gated(16, 12, [Spec(8, 8, 2)], torch.float32)
    world.gates[0, column] = value
    y = torch.zeros(3, 12)
    arguments = (y, torch.randn(3, 16), world.pool, world.records, world.gates, segments_of(Group(0, range(3))))
    with pytest.raises(ValueError, match=said):
        dispatch.gated_lowrank(*arguments)
    assert not y.any()


def test_compiles_into_one_graph() -> None:
    world = gated(32, 48, [Spec(8, 8, 2)], torch.float32)
    segments = segments_of(Group(0, [0, 2]))

    def module(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        return dispatch.gated_lowrank(y, x, world.pool, world.records, world.gates, segments).relu()

    x, weight = torch.randn(3, 32), torch.randn(32, 48)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert close(compiled(x, weight), module(x, weight), 1e-5)
    assert sum(world.counts(0)) == 2 * 2 * 2
