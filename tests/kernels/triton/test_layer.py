"""What stands between the products of a layer: kernels against the reference, and that against transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernels import dispatch_layer, reference_layer
from kernels.triton import layer
from tests.kernels.triton.support import on_device

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # a place of the type, relative


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def angles(tokens: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.randn(tokens, dim // 2) * 3
    return torch.cat([half, half], -1).cos().to(dtype), torch.cat([half, half], -1).sin().to(dtype)


@pytest.mark.parametrize("size", [1, 7, 64, 1100])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, delta, weight = on_device(*(torch.randn(shape).to(dtype) for shape in ((5, size), (5, size), (size,))))
    for added in (None, delta):
        total, normed = layer.add_rms_norm(x, added, weight, 1e-5)
        expected_total, expected = reference_layer.add_rms_norm(x, added, weight, 1e-5)
        assert torch.equal(total, expected_total)
        near(normed, expected)
    own, other = (layer.add_rms_norm(x, given, weight, 1e-5)[1] for given in (delta, delta.flip(0)))
    assert size == 1 or not torch.allclose(other, own, atol=0.1), "rows keep their own delta"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_reference_is_transformers_to_the_bit(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-6).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 48).to(dtype)
    assert torch.equal(reference_layer.add_rms_norm(x, None, norm.weight, 1e-6)[1], norm(x))
    query, (cos, sin) = torch.randn(1, 3, 5, 48).to(dtype), angles(5, 48, dtype)
    expected, _ = apply_rotary_pos_emb(query, query, cos[None], sin[None])
    rows = query[0].transpose(0, 1).clone()
    assert torch.equal(reference_layer.rotate(rows, cos, sin), expected[0].transpose(0, 1))


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 6), (5, 64), (9, 128)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rotate(dtype: torch.dtype, heads: int, dim: int) -> None:
    """In place, within wider rows whose other numbers stay."""
    rows, weight = on_device(torch.randn(4, heads + 2, dim).to(dtype), torch.randn(dim).to(dtype))
    cos, sin = on_device(*angles(4, dim, dtype))
    for own in (None, weight):
        expected, found = rows.clone(), rows.clone()
        reference_layer.rotate(expected[:, 1:-1], cos, sin, own, 1e-5)
        layer.rotate(found[:, 1:-1], cos, sin, own, 1e-5)
        near(found, expected)
        assert torch.equal(found[:, [0, -1]], rows[:, [0, -1]])
        assert not torch.allclose(found, rows, atol=0.01)


@pytest.mark.parametrize("size", [1, 100, 2050])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    """Gate and up are parts of wider rows; large numbers neither overflow nor vanish."""
    [both] = on_device(torch.randn(3, 2 * size).to(dtype) * 4)
    both[0, 0], both[1, 0] = 90.0, -90.0
    gate, up = both[:, :size], both[:, size:]
    found = layer.silu_mul(gate, up)
    near(found, reference_layer.silu_mul(gate, up))
    assert found.is_contiguous()
    assert size == 1 or not torch.allclose(layer.silu_mul(up, gate), found, atol=0.1)


def test_a_row_has_the_bits_it_has_alone() -> None:
    x, delta, weight = on_device(torch.randn(7, 96), torch.randn(7, 96), torch.randn(96))
    cos, sin = on_device(*angles(7, 32, torch.float32))
    norms, turned = (
        layer.add_rms_norm(x, delta, weight, 1e-5)[1],
        layer.rotate(x.clone().view(7, 3, 32), cos, sin, None, 0),
    )
    products = layer.silu_mul(x, delta)
    for row in range(7):
        own = slice(row, row + 1)
        assert torch.equal(layer.add_rms_norm(x[own], delta[own], weight, 1e-5)[1], norms[own])
        assert torch.equal(layer.rotate(x[own].clone().view(1, 3, 32), cos[own], sin[own], None, 0), turned[own])
        assert torch.equal(layer.silu_mul(x[own], delta[own]), products[own])


def test_what_does_not_belong_together_is_refused() -> None:
    x, weight, half = torch.randn(3, 8), torch.randn(8), torch.randn(3, 4)
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch_layer.add_rms_norm(x, half, weight, 1e-5)
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch_layer.add_rms_norm(x, x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch_layer.rotate(x.view(3, 2, 4), half[:2], half[:2])
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch_layer.rotate(torch.randn(3, 2, 5), torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch_layer.silu_mul(x, half)
