"""C++ `int8_linear` against the reference: the same integers, so the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dispatch, int8, reference

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows around the tile of 8, inputs around 4 and 64, outputs around 16 and the panel of 48; those of SmolLM2-135M.
SHAPES = [(1, 1, 1), (7, 3, 5), (8, 64, 16), (9, 65, 17), (16, 130, 47), (17, 576, 192), (3, 1536, 576), (33, 577, 49)]


def weights(outer: int, inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values over the whole range, scales and a bias that differ from output to output."""
    return torch.randint(-127, 128, (outer, inner), dtype=torch.int8), torch.rand(outer) / 100, torch.randn(outer)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return dispatch.int8_linear(x, dispatch.int8_pack(weight), scale, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
def test_equals_the_reference_to_the_bit(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    weight, scale, bias = weights(outer, inner)
    x = (3 * torch.randn(rows, inner)).to(dtype)
    for given_bias in (None, bias):
        result = product(x, weight, scale, given_bias)
        assert result.dtype == dtype
        assert torch.equal(result, reference.int8_linear(x, weight, scale, given_bias))
    if outer > 1:
        assert not torch.equal(product(x, weight, scale.roll(1), bias), reference.int8_linear(x, weight, scale, bias))
        assert not torch.equal(product(x, weight, scale, bias.roll(1)), reference.int8_linear(x, weight, scale, bias))


def test_integers_are_exact_at_the_ends_of_their_range() -> None:
    """Row scale 1: the result is the integer sum itself, the largest that 1536 inputs can give."""
    weight = torch.full((50, 1536), -127, dtype=torch.int8)
    weight[1::2] = 127
    x = torch.full((3, 1536), 127.0)
    x[1] = -127.0
    x[2, ::2] = -127.0
    expected = x.long() @ weight.long().T
    assert torch.equal(product(x, weight, torch.ones(50), None), expected.float())
    assert int(expected.max()) == 1536 * 127 * 127


def test_is_near_the_product_of_the_unrounded_numbers() -> None:
    """The reference itself: rounding both sides to 8 bits costs about 1 % of a random product."""
    x, weight = torch.randn(32, 576), torch.randn(64, 576)
    values, scale = reference.int8_rows(weight)
    exact = x @ weight.T
    error = (product(x, values, scale, None) - exact).norm() / exact.norm()
    assert 0.002 < float(error) < 0.02


def test_rows_are_rounded_to_even_and_scaled_by_their_largest() -> None:
    values, scale = reference.int8_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, -254.0, 1.0, 3.0]]))
    assert values.tolist() == [[127, 0, 2, -2], [0, -127, 0, 2]]
    assert scale.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-31, 1e-20, 1e4, 1e30, 3e38])
def test_extreme_magnitudes(magnitude: float, dtype: torch.dtype) -> None:
    weight, scale, _ = weights(20, 70)
    x = (magnitude * (2 * torch.rand(4, 70) - 1)).to(dtype)
    result = product(x, weight, scale, None)
    assert torch.equal(result.nan_to_num(7.0), reference.int8_linear(x, weight, scale, None).nan_to_num(7.0))
    if magnitude <= 1e30 and x.isfinite().all():
        assert result.isfinite().all()
    if magnitude == 0:
        assert not result.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_is_its_own_problem(bad: float, dtype: torch.dtype) -> None:
    weight, scale, bias = weights(50, 77)
    x = torch.randn(9, 77).to(dtype)
    healthy = product(x, weight, scale, bias)
    for place in (0, 40, 76):
        spoilt = x.clone()
        spoilt[4, place] = bad
        result = product(spoilt, weight, scale, bias)
        assert result[4].isnan().all()
        others = [row for row in range(9) if row != 4]
        assert torch.equal(result[others], healthy[others])


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40])
def test_bits_of_a_row_do_not_depend_on_batch_mates_or_threads(rows: int, threads: None) -> None:
    weight, scale, bias = weights(577, 576)
    packed = dispatch.int8_pack(weight)
    x = torch.randn(rows, 576).bfloat16()
    torch.set_num_threads(1)
    whole = dispatch.int8_linear(x, packed, scale, bias)
    for row in range(rows):
        assert torch.equal(dispatch.int8_linear(x[row : row + 1], packed, scale, bias)[0], whole[row])
    torch.set_num_threads(2)
    assert torch.equal(dispatch.int8_linear(x, packed, scale, bias), whole)
    assert torch.equal(dispatch.int8_linear(x.flip(0), packed, scale, bias).flip(0), whole)


@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from([16, 48]))
@settings(max_examples=40, deadline=None)
def test_unpack_undoes_pack(outer: int, inner: int, panel: int) -> None:
    weight = torch.randint(-128, 128, (outer, inner), dtype=torch.int8)
    assert torch.equal(int8.unpack(int8.pack(weight, panel), outer, inner), weight)


def test_strided_and_empty_rows() -> None:
    weight, scale, bias = weights(30, 20)
    wide = torch.randn(6, 40)
    for x in (wide[:, :20], wide[::2, 20:], wide[:, ::2], torch.empty(0, 20)):
        assert torch.equal(product(x, weight, scale, bias), reference.int8_linear(x, weight, scale, bias))


def test_wrong_shapes_and_types_are_refused() -> None:
    weight, scale, bias = weights(30, 20)
    packed, x = dispatch.int8_pack(weight), torch.randn(2, 20)
    for arguments, words in (
        ((torch.randn(2, 24), packed, scale, bias), "do not fit"),
        ((x[0], packed, scale, bias), "T, in"),
        ((x.int(), packed, scale, bias), "Int"),
        ((x, packed, scale.double(), bias), "scale"),
        ((x, packed, scale, bias[:-1]), "bias"),
        ((torch.randn(2, 21), weight, scale, bias), "does not fit the weight"),
        ((x, weight, scale[:-1], bias), "scale"),
    ):
        with pytest.raises(ValueError, match=words):
            dispatch.int8_linear(*arguments)
    with pytest.raises(ValueError, match="32-bit sum"):
        dispatch.int8_pack(torch.zeros(1, int8.MAX_INPUTS + 1, dtype=torch.int8))


def test_the_reference_runs_on_plain_weights() -> None:
    weight, scale, bias = weights(30, 20)
    x = torch.randn(4, 20)
    assert torch.equal(dispatch.int8_linear(x, weight, scale, bias), product(x, weight, scale, bias))
    assert dispatch.int8_unpack(weight, 30, 20) is weight


def test_shapes_are_known_without_running() -> None:
    weight, scale, bias = weights(30, 20)
    packed = dispatch.int8_pack(weight)
    result = dispatch.int8_linear(*(t.to("meta") for t in (torch.randn(5, 20).bfloat16(), packed, scale, bias)))
    assert (result.shape, result.dtype) == ((5, 30), torch.bfloat16)
    torch.library.opcheck(torch.ops.polyrank.int8_linear.default, (torch.randn(5, 20), packed, scale, bias))
