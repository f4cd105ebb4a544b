"""What stands between a layer's products, as launches. Shapes and types have been checked; nothing waits."""

import torch
import triton

from kernels.triton import launch, layer_parts


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_layer.add_rms_norm`."""
    x = launch.unit_stride(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    added = x if delta is None else launch.unit_stride(delta)
    total = x if delta is None else torch.empty_like(out)
    layer_parts.add_rms_norm[(len(x),)](
        out, total, x, added, weight, x.stride(0), added.stride(0), x.shape[1], eps,
        ADD=delta is not None, BLOCK=(block := triton.next_power_of_2(x.shape[1])), **launch.row_options(block),
    )  # fmt: skip
    return total, out


def rotate(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`reference_layer.rotate`."""
    tokens, heads, dim = rows.shape
    cos, sin, half = launch.unit_stride(cos), launch.unit_stride(sin), triton.next_power_of_2(dim // 2)
    piece = max(1, min(triton.next_power_of_2(heads), launch.ROTATED // half))
    layer_parts.rotate[(tokens, triton.cdiv(heads, piece))](
        rows, cos, sin, cos if weight is None else weight, *rows.stride()[:2], cos.stride(0), sin.stride(0), heads, eps,
        NORM=weight is not None, DIM=dim, HALF=half, HEADS=piece, **launch.row_options(piece * half),
    )  # fmt: skip
    return rows


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference_layer.silu_mul`."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grid = (len(gate), triton.cdiv(gate.shape[1], launch.WRITE_BLOCK))
    layer_parts.silu_mul[grid](
        out, gate, up, gate.stride(0), up.stride(0), gate.shape[1],
        BLOCK=launch.WRITE_BLOCK, **launch.row_options(launch.WRITE_BLOCK),
    )  # fmt: skip
    return out
