"""Plain torch meaning of what stands between the products of a decoder layer: the specification of those kernels.

Each intermediate result that transformers would store is rounded to the rows' type, so the numbers are transformers'
own but for the order of a sum. Rows are independent of each other.
"""

import torch


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`s = x + delta` (x itself without a delta) and `weight * s / sqrt(mean(s^2) + eps)`.

    x, delta: [T, size]; weight: [size]; all of one type. Source: RMSNorm (arXiv 1910.07467) eq. 4.
    """
    total = x if delta is None else x + delta
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, weight * (wide * scale).to(x.dtype)


def rotate(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """Turn each head in place: `r * cos + half(r) * sin`, where `half` puts the second half, negated, before the first.

    rows: [T, heads, dim], dim even; cos, sin: [T, dim]. With a weight [dim] each head is normed before, as in
    `add_rms_norm`. Source: RoPE (arXiv 2104.09864) eq. 34, in transformers' order of dimensions.
    """
    given = rows if weight is None else add_rms_norm(rows.flatten(0, 1), None, weight, eps)[1].view(rows.shape)
    first, second = given.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return rows.copy_(given * cos[:, None] + turned * sin[:, None])


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, [T, size] each. Source: SwiGLU (arXiv 2002.05202) eq. 6."""
    return torch.nn.functional.silu(gate) * up
