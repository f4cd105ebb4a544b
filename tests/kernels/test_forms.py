"""C++ kernels of forms against the reference: types, odd sizes, borders of memory, and the bits of every row."""

from collections.abc import Callable

import pytest
import torch

from kernels import dispatch_forms, reference_forms
from kernels.segments import FormField, Segments
from tests.kernels.form_support import Forms, dense, output_scale, pack, sparse, transform
from tests.kernels.support import Group, by_threads, close, row_alone, segments_of, swapped

pytestmark = pytest.mark.usefixtures("native")

VOCABULARY = 50
ROWS = 48
# Rows 0 and 3 take several adapters, slot 2 has rows for more than a vector of them, slot 3 no form, row 47 is base.
GROUPS = [
    Group(0, [0, 3, 40], [0.5, 1.0, 1.0]),
    Group(1, [1, 0], [1.0, -0.75]),
    Group(2, [*range(4, 39), 3], [*[1.0] * 35, 0.3]),
    Group(3, [41]),
    Group(1, []),
    Group(4, [42, 43, 44, 45, 46], [1.0, 2.0, 0.3, 1.0, 1.0]),
    Group(0, [2], [1.5]),
]
FACTORS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(576, 192), (123, 431), (431, 123), (17, 1), (1, 17), (40, 33)]
DELTAS = ("dense_delta", "sparse_delta")


def adapters(op: str, inputs: int, outputs: int, factor: torch.dtype = torch.float32) -> list[Forms]:
    """Four with the form, in slots 0, 1, 2 and 4."""
    sizes = [size for size in (1, 3, 4, 16, 24, 41, inputs) if inputs % size == 0]
    strides = [1, 2, max(outputs // 2, 1), 4]
    makers: dict[str, Callable[[int], Forms]] = {
        "dense_delta": lambda _: dense(outputs, inputs, factor),
        "sparse_delta": lambda i: sparse(outputs, inputs, (0.02, 0.1, 0.3, 0.9)[i]),
        "sparse_embedding": lambda i: sparse(VOCABULARY, outputs, (0.02, 0.1, 0.3, 0.9)[i]),
        "transform_input": lambda i: transform(inputs, sizes[i % len(sizes)]),
        "scale_output": lambda i: output_scale(outputs, strides[i], only=("", "", "scale", "bias")[i]),
    }
    made = [makers[op](i) for i in range(4)]
    return [*made[:3], Forms(), made[3]]


def rows(op: str, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What the operation takes before the pool; the first is changed, or what the result is a change of."""
    x, y = torch.randn(ROWS, inputs).to(dtype), torch.randn(ROWS, outputs).to(dtype)
    if op == "transform_input":
        return (x,)
    if op == "scale_output":
        return (y,)
    return (y, torch.randint(0, VOCABULARY, (ROWS,))) if op == "sparse_embedding" else (y, x)


def native(op: str, given: tuple[torch.Tensor, ...], *step: torch.Tensor | Segments) -> torch.Tensor:
    found: torch.Tensor = getattr(dispatch_forms, op)(given[0].clone(), *given[1:], *step)
    return found


def specified(op: str, given: tuple[torch.Tensor, ...], *step: torch.Tensor | Segments) -> torch.Tensor:
    found: torch.Tensor = getattr(reference_forms, op)(given[0].clone(), *given[1:], *step)
    return found


OPS = (*DELTAS, "sparse_embedding", "transform_input", "scale_output")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op: str, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    for factor in FACTORS if op == "dense_delta" else FACTORS[:1]:
        pool, forms = pack(adapters(op, inputs, outputs, factor))
        given, segments = rows(op, inputs, outputs, dtype), segments_of(*GROUPS)
        atol = 1e-6 * inputs**0.5
        expected = specified(op, given, pool, forms, segments)
        found = native(op, given, pool, forms, segments)
        assert close(found, expected, atol), factor
        assert torch.equal(found[[41, 47]], given[0][[41, 47]])
        assert not close(native(op, given, pool, forms, swapped(segments, 0, 4)), expected, atol)


@pytest.mark.parametrize("segments", [segments_of(), segments_of(Group(0, []), Group(3, [1]))], ids=["none", "empty"])
@pytest.mark.parametrize("op", OPS)
def test_other_rows_are_left_alone(op: str, segments: Segments) -> None:
    pool, forms = pack(adapters(op, 24, 17))
    given = rows(op, 24, 17, torch.float32)
    assert torch.equal(native(op, given, pool, forms, segments), given[0])


def test_the_input_of_a_transform_stays() -> None:
    pool, forms = pack(adapters("transform_input", 24, 1))
    x = torch.randn(ROWS, 24)
    kept = x.clone()
    dispatch_forms.transform_input(x, pool, forms, segments_of(*GROUPS))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("op", OPS)
def test_reads_strided_rows_and_writes_within_its_columns(op: str) -> None:
    pool, forms = pack(adapters(op, 123, 431))
    segments = segments_of(*GROUPS)
    first, *rest = rows(op, 123, 431, torch.float32)
    canvas = torch.full((ROWS + 2, 600), 7.0)
    y = canvas[1:-1, 20 : 20 + first.shape[1]]
    y.copy_(first)
    others = [torch.nn.functional.pad(x, (9, 5))[:, 9:-5] if x.dim() == 2 else x for x in rest]
    expected = specified(op, (first, *rest), pool, forms, segments)
    found = getattr(dispatch_forms, op)(y, *others, pool, forms, segments)
    assert close(found, expected, 1e-4)
    y.fill_(7.0)
    assert bool((canvas == 7.0).all()), "wrote outside of y"


@pytest.mark.parametrize("op", OPS)
def test_reads_and_writes_with_a_stride_inside_the_row(op: str) -> None:
    pool, forms = pack(adapters(op, 17, 23))
    given, segments = rows(op, 17, 23, torch.float32), segments_of(*GROUPS)
    turned = tuple(tensor.T.contiguous().T if tensor.dim() == 2 else tensor for tensor in given)
    expected = specified(op, given, pool, forms, segments)
    assert close(getattr(dispatch_forms, op)(*turned, pool, forms, segments), expected, 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_forms_may_be_one_column_of_a_table_of_modules(op: str) -> None:
    pool, forms = pack(adapters(op, 24, 17))
    table = torch.stack([torch.zeros_like(forms), forms], dim=1)  # slots, modules
    given, segments = rows(op, 24, 17, torch.float32), segments_of(*GROUPS)
    expected = native(op, given, pool, forms, segments)
    assert torch.equal(native(op, given, pool, table[:, 1], segments), expected)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize(("op", "factor"), [*((op, torch.float32) for op in OPS), ("dense_delta", torch.bool)], ids=str)
def test_bits_of_a_row_do_not_depend_on_batch_mates(op: str, factor: torch.dtype, dtype: torch.dtype) -> None:
    pool, forms = pack(adapters(op, 576, 431, factor))
    given = rows(op, 576, 431, dtype)
    whole = native(op, given, pool, forms, segments_of(*GROUPS))
    for row in range(ROWS):
        alone = row_alone(GROUPS, row)
        one = native(op, tuple(tensor[row : row + 1] for tensor in given), pool, forms, alone)
        assert torch.equal(one[0], whole[row]), row


@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_number_of_threads(op: str, threads: None) -> None:
    pool, forms = pack(adapters(op, 1152, 1536))
    given = rows(op, 1152, 1536, torch.float32)
    results = by_threads(lambda: native(op, given, pool, forms, segments_of(*GROUPS)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_changes_of_one_row_are_rounded_once() -> None:
    """In bfloat16, 1 + 1/256 is 1: two biases of 1/256 that are rounded one by one would be lost."""
    pool, forms = pack([Forms(bias=torch.full((5,), 2**-8), stride=1)] * 2)
    y = torch.ones(1, 5, dtype=torch.bfloat16)
    found = dispatch_forms.scale_output(y, pool, forms, segments_of(Group(0, [0]), Group(1, [0])))
    assert torch.equal(found, torch.full((1, 5), 1 + 2**-7, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("op", "field", "value", "match"),
    [
        ("dense_delta", FormField.DENSE_ROWS, 16, "DENSE_ROWS"),
        ("dense_delta", FormField.DENSE_DTYPE, 4, "DENSE_DTYPE"),
        ("dense_delta", FormField.DENSE, 1 << 40, "block DENSE"),
        ("dense_delta", FormField.DENSE_SCALE, -1, "block DENSE_SCALE"),
        ("sparse_delta", FormField.SPARSE_ROWS, 18, "SPARSE_ROWS"),
        ("sparse_delta", FormField.SPARSE_VALUE, 1 << 40, "block SPARSE_VALUE"),
        ("sparse_embedding", FormField.SPARSE_COLUMN, -1, "block SPARSE_COLUMN"),
        ("transform_input", FormField.TRANSFORM_SIZE, 5, "blocks of 5"),
        ("transform_input", FormField.TRANSFORM, 1 << 40, "block TRANSFORM"),
        ("scale_output", FormField.SCALE_STRIDE, 3, "pairs 3 apart"),
        ("scale_output", FormField.SCALE, 1 << 40, "block SCALE"),
    ],
)
@pytest.mark.parametrize("call", [native, specified])
def test_a_wrong_record_is_an_error_before_anything_is_written(
    op: str, field: FormField, value: int, match: str, call: Callable[..., torch.Tensor]
) -> None:
    made = output_scale(16) if op == "scale_output" else adapters(op, 24, 17)[0]
    pool, forms = pack([made])
    forms[0, field] = value
    given = rows(op, 24, 16 if op == "scale_output" else 17, torch.float32)
    with pytest.raises(ValueError, match=match):
        call(op, given, pool, forms, segments_of(Group(0, [0])))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    pool, forms = pack(adapters("sparse_embedding", 24, 17))
    ids = torch.tensor([token])
    with pytest.raises(ValueError, match="id"):
        dispatch_forms.sparse_embedding(torch.zeros(1, 17), ids, pool, forms, segments_of(Group(0, [0])))
