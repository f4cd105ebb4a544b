"""The specification of forms besides low-rank deltas, against dense matrices written out here."""

from collections.abc import Callable

import pytest
import torch

from kernels import dispatch_forms, reference_forms
from kernels.segments import FORM_FIELDS, FormField
from tests.kernels.form_support import Forms, dense, output_scale, pack, per_row, sparse, transform
from tests.kernels.support import Group, segments_of, swapped

ROWS = 9
# Row 0 takes two adapters, row 4 one without the form, row 1 the same adapter twice; rows 7 and 8 are base.
GROUPS = [Group(0, [0, 1, 1, 5], [0.5, 1.0, -0.5, 1.0]), Group(1, [2, 0, 6], [1.0, 0.75, 2.0]), Group(2, [4, 3])]
NOTHING = Forms()


def check(found: torch.Tensor, expected: torch.Tensor, given: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[7:], given[7:])
    assert torch.equal(found[4], given[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 17), (7, 5), (1, 3)])
def test_dense(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    adapters = [dense(outputs, inputs, dtype), dense(outputs, inputs, dtype), NOTHING]
    check_delta(adapters, inputs, outputs, reference_forms.dense_delta)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 17), (7, 5), (1, 3)])
def test_sparse(inputs: int, outputs: int) -> None:
    adapters = [sparse(outputs, inputs), sparse(outputs, inputs, 0.9), NOTHING]
    check_delta(adapters, inputs, outputs, reference_forms.sparse_delta)


def check_delta(adapters: list[Forms], inputs: int, outputs: int, op: Callable[..., torch.Tensor]) -> None:
    pool, forms = pack(adapters)
    segments = segments_of(*GROUPS)
    x, y = torch.randn(ROWS, inputs), torch.randn(ROWS, outputs)
    expected = y.double()
    for row, taken in per_row(segments).items():
        for slot, weight in taken:
            if slot < 2:
                expected[row] += weight * (adapters[slot].delta() @ x[row].double())
    check(op(y.clone(), x, pool, forms, segments), expected, y)
    assert not torch.allclose(op(y.clone(), x, pool, forms, swapped(segments)).double(), expected, 1e-3, 1e-3)


def test_sparse_embedding() -> None:
    adapters = [sparse(40, 12), sparse(40, 12, 0.9), NOTHING]
    pool, forms = pack(adapters)
    segments, ids, y = segments_of(*GROUPS), torch.randint(0, 40, (ROWS,)), torch.randn(ROWS, 12)
    ids[0], ids[1] = 39, 0
    expected = y.double()
    for row, taken in per_row(segments).items():
        for slot, weight in taken:
            if slot < 2:
                expected[row] += weight * adapters[slot].delta()[ids[row]]
    check(reference_forms.sparse_embedding(y.clone(), ids, pool, forms, segments), expected, y)
    other = reference_forms.sparse_embedding(y.clone(), ids, pool, forms, swapped(segments))
    assert not torch.allclose(other.double(), expected, 1e-3, 1e-3)


@pytest.mark.parametrize(("inputs", "sizes"), [(24, (4, 3)), (24, (1, 24)), (7, (1, 1)), (1, (1, 1))])
def test_transform(inputs: int, sizes: tuple[int, int]) -> None:
    adapters = [transform(inputs, sizes[0]), transform(inputs, sizes[1]), NOTHING]
    pool, forms = pack(adapters)
    segments, x = segments_of(*GROUPS), torch.randn(ROWS, inputs)
    expected = x.double()
    for row, taken in per_row(segments).items():
        for slot, weight in taken:
            if slot < 2:
                given = x[row].double()
                expected[row] += weight * (adapters[slot].rotation() @ given - given)
    kept = x.clone()
    check(reference_forms.transform_input(x, pool, forms, segments), expected, x)
    assert torch.equal(x, kept), "the input is read by the deltas too"
    other = reference_forms.transform_input(x, pool, forms, swapped(segments))
    assert not torch.allclose(other.double(), expected, 1e-3, 1e-3)


@pytest.mark.parametrize("only", ["", "scale", "bias", "pair"])
@pytest.mark.parametrize(("outputs", "stride"), [(24, 1), (24, 12), (24, 4), (7, 2), (1, 1)])
def test_scale(outputs: int, stride: int, only: str) -> None:
    if only == "pair" and outputs % (2 * stride):
        return
    adapters = [output_scale(outputs, stride, only=only), output_scale(outputs, stride, only=only), NOTHING]
    pool, forms = pack(adapters)
    segments, y = segments_of(*GROUPS), torch.randn(ROWS, outputs)
    expected = y.double()
    for row, taken in per_row(segments).items():
        for slot, weight in taken:
            if slot < 2:
                matrix, bias = adapters[slot].scaling(outputs)
                expected[row] += weight * (matrix @ y[row].double() - y[row].double() + bias)
    check(reference_forms.scale_output(y.clone(), pool, forms, segments), expected, y)
    other = reference_forms.scale_output(y.clone(), pool, forms, swapped(segments))
    assert not torch.allclose(other.double(), expected, 1e-3, 1e-3)


def arguments(op: str) -> tuple[torch.Tensor, ...]:
    rows = torch.randn(ROWS, 12)
    second = torch.zeros(ROWS, dtype=torch.int64) if op == "sparse_embedding" else torch.randn(ROWS, 12)
    return (rows,) if op in ("transform_input", "scale_output") else (rows, second)


OPS = ["dense_delta", "sparse_delta", "sparse_embedding", "transform_input", "scale_output"]
EVERYTHING = Forms(
    sparse(12, 12, 0.9).sparse, dense(12, 12, torch.float32).dense, torch.randn(12), transform(12, 3).blocks
)


@pytest.mark.parametrize("op", OPS)
def test_a_step_without_segments_changes_nothing(op: str) -> None:
    pool, forms = pack([EVERYTHING])
    given = arguments(op)
    assert torch.equal(getattr(dispatch_forms, op)(*given, pool, forms, segments_of()), given[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"token": torch.tensor([ROWS], dtype=torch.int32)}, "token"),
        ({"slot": torch.tensor([1], dtype=torch.int32)}, "slot"),
        ({"pool": torch.zeros(64)}, "pool"),
        ({"pool": torch.zeros(8, dtype=torch.uint8)}, "pool"),
        ({"forms": torch.zeros(1, FORM_FIELDS - 1, dtype=torch.int64)}, "forms"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_a_mistake_is_an_error_that_names_it(op: str, change: dict[str, torch.Tensor], match: str) -> None:
    pool, forms = pack([EVERYTHING])
    forms[0, FormField.SCALE_STRIDE], forms[0, FormField.SCALE] = 1, forms[0, FormField.DENSE_SCALE]
    forms[0, FormField.SCALE_BIAS] = forms[0, FormField.SCALE_PAIR] = -1
    segments = segments_of(Group(0, [0]))
    segments = type(segments)(
        change.get("slot", segments.slot), segments.start, change.get("token", segments.token), segments.weight
    )
    with pytest.raises(ValueError, match=match):
        getattr(dispatch_forms, op)(*arguments(op), change.get("pool", pool), change.get("forms", forms), segments)
