"""C++ `linear` against the reference: types, odd sizes, and the bits of every row."""

import pytest
import torch

from kernels import dispatch, reference
from tests.kernels.support import close

pytestmark = pytest.mark.usefixtures("native")

TYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]


def operands(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero-mean, with results of about unit size."""
    weight = torch.randn(outer, inner) / inner**0.5
    return torch.randn(rows, inner).to(dtype), weight.to(dtype), torch.randn(outer).to(dtype)


@pytest.mark.parametrize(("dtype", "unit"), TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 128, 129])
@pytest.mark.parametrize(("inner", "outer"), [(576, 192), (123, 431), (1536, 50), (17, 1), (1, 17), (7, 3)])
def test_matches_reference(rows: int, inner: int, outer: int, dtype: torch.dtype, unit: float) -> None:
    x, weight, bias = operands(rows, inner, outer, dtype)
    for offset in (bias, None):
        expected = reference.linear(x, weight, offset)
        assert close(dispatch.linear(x, weight, offset), expected, unit * inner**0.5)
        if rows > 1:
            assert not close(dispatch.linear(x.roll(1, 0), weight, offset), expected, unit * inner**0.5)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in TYPES], ids=str)
@pytest.mark.parametrize("rows", [2, 3, 7, 40])
def test_bits_of_a_row_depend_on_neither_batch_mates_nor_threads(rows: int, dtype: torch.dtype, threads: None) -> None:
    x, weight, bias = operands(rows, 577, 301, dtype)
    torch.set_num_threads(1)
    whole = dispatch.linear(x, weight, bias)
    for row in range(rows):
        assert torch.equal(dispatch.linear(x[row : row + 1], weight, bias)[0], whole[row])
    torch.set_num_threads(2)
    assert torch.equal(dispatch.linear(x, weight, bias), whole)
    assert torch.equal(dispatch.linear(x.flip(0), weight, bias).flip(0), whole)


def test_strided_and_empty_rows() -> None:
    _, weight, bias = operands(1, 20, 30, torch.float32)
    wide = torch.randn(6, 40)
    for x in (wide[:, :20], wide[::2, 20:], wide[:, ::2], torch.empty(0, 20)):
        assert close(dispatch.linear(x, weight, bias), reference.linear(x, weight, bias), 1e-5)


@pytest.mark.parametrize("device", ["native", "reference"])
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((2, 5), (3, 4), None),
        ((2, 5), (15,), None),
        ((5,), (3, 5), None),
        ((2, 5), (3, 5), (4,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    device: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "reference":
        monkeypatch.setattr(dispatch, "_cpu_loaded", False)
    with pytest.raises(ValueError, match="expected"):
        dispatch.linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_types_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one type"):
        dispatch.linear(torch.zeros(2, 5), torch.zeros(3, 5).bfloat16())


def test_compiles_into_one_graph() -> None:
    x, weight, bias = operands(5, 32, 48, torch.float32)
    compiled = torch.compile(lambda rows: dispatch.linear(rows, weight, bias) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dispatch.linear(x, weight, bias) * 2)
