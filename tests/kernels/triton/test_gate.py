"""The gate between shrink and expand, and embeddings, against the reference."""

import pytest
import torch

from kernels import reference
from kernels.segments import FACTOR_DTYPES, GateField, Limits
from kernels.triton import lowrank
from kernels.triton.chunks import chunks_of
from tests.kernels.gated import Gated, Spec, gated
from tests.kernels.support import close, lowrank_adapter, segments_of, swapped
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.support import GROUPS, ROWS, on, on_device, packed


def world(
    inner: int, outer: int, specs: list[Spec], factor: torch.dtype, *, bias: bool = True, core: bool = False
) -> Gated:
    made = gated(inner, outer, specs, factor, factor, bias=bias, core=core)
    return Gated(made.pool.to(DEVICE), made.records.to(DEVICE), made.gates.to(DEVICE))


# rank, router rows, active: one router row for each rank; two ranks to a row; no gate; the extremes; every rank
SPECS = [Spec(16, 16, 4), Spec(18, 9, 5), Spec(8, 0, 0), Spec(1, 1, 1), Spec(33, 33, 8), Spec(7, 7, 7)]


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("core", [False, True], ids=["gate", "gate and core"])
def test_gated_adapters_match_the_reference(dtype: torch.dtype, factor: torch.dtype, core: bool) -> None:
    made = world(70, 45, SPECS, factor, core=core)
    pool, records, gates, theirs = made.pool, made.records, made.gates, made.pool.clone()
    y, x = on_device(torch.randn(ROWS, 45).to(dtype), torch.randn(ROWS, 70).to(dtype))
    segments = segments_of(*GROUPS)
    expected = reference.gated_lowrank(y.clone(), x, theirs, records, gates, on(segments))
    atol = 1e-5 if dtype == torch.float32 else 2**-15 * float((expected - y).abs().max())

    result = y.clone()
    lowrank.gated_lowrank(result, x, pool, records, gates, chunks_of(segments, DEVICE, Limits(40)))

    assert close(result, expected, atol)
    assert torch.equal(result[ROWS - 1], y[ROWS - 1])
    assert torch.equal(pool, theirs), "counts differ, or something else was written"
    assert sum(made.counts(0)) == 4
    wrong = reference.gated_lowrank(y.clone(), x, pool, records, gates, on(swapped(segments, 0, 4)))
    assert not close(result, wrong, atol)
    assert not close(result, reference.lowrank(y.clone(), x, pool, records, on(segments)), atol), "no gate at all"


def test_the_gate_follows_the_formula() -> None:
    """SMoRA: z = sigmoid(R x) + bias; the k largest z, over their sum, times k (here written out for one token)."""
    made = world(5, 4, [Spec(6, 3, 2)], torch.float32)
    x = torch.randn(1, 5, device=DEVICE)
    router, bias = (
        made.block(0, column, count).tolist() for column, count in ((GateField.ROUTER, 15), (GateField.BIAS, 6))
    )
    dots = [sum(router[5 * i + j] * float(x[0, j]) for j in range(5)) for i in range(3)]
    z = [1 / (1 + 2.718281828459045 ** -dots[rank // 2]) + bias[rank] for rank in range(6)]
    best = sorted(range(6), key=lambda rank: -z[rank])[:2]
    expected = [2 * z[rank] / sum(z[i] for i in best) if rank in best else 0.0 for rank in range(6)]
    assert reference.lora_gate(x, made.pool, made.gates[0])[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_go_to_the_lower_rank() -> None:
    """Two ranks share each row of the router and there is no bias, so every score occurs twice; 3 of 8 are taken."""
    made = world(12, 10, [Spec(8, 4, 3)] * 6, torch.float32, bias=False)
    pool, records, gates = made.pool, made.records, made.gates
    y, x = on_device(torch.zeros(ROWS, 10), torch.randn(ROWS, 12))
    used = reference.lora_gate(x, pool, gates[0]) > 0
    assert used.sum(1).tolist() == [3] * ROWS
    assert not bool((used[:, 1::2] & ~used[:, 0::2]).any())
    segments = segments_of(*GROUPS)
    expected = reference.gated_lowrank(y.clone(), x, pool, records, gates, on(segments))
    lowrank.gated_lowrank(y, x, pool, records, gates, chunks_of(segments, DEVICE, Limits(8)))
    assert close(y, expected, 1e-5)


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
@pytest.mark.parametrize("factor", FACTOR_DTYPES, ids=str)
def test_embeddings_match_the_reference(factor: torch.dtype, core: bool) -> None:
    ranks = (1, 3, 17, 8, 40, 0)
    adapters = [lowrank_adapter(r, 31, 45, factor, embedding=True, bias=r == 3, core=core) for r in ranks]
    pool, records = packed(adapters)
    y, ids = on_device(torch.randn(ROWS, 45), torch.randint(31, (ROWS,)))
    segments = segments_of(*GROUPS)
    expected = reference.lowrank_embedding(y.clone(), ids, pool, records, on(segments))
    result = y.clone()
    lowrank.lowrank_embedding(result, ids, pool, records, chunks_of(segments, DEVICE, Limits(40)))
    assert close(result, expected, 1e-5)
    assert torch.equal(result[ROWS - 1], y[ROWS - 1])
    wrong = reference.lowrank_embedding(y.clone(), ids, pool, records, on(swapped(segments, 1, 4)))
    assert not close(result, wrong, 1e-5)
