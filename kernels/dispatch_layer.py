"""The rest of the door (`kernels.dispatch`): what stands between the products of a decoder layer.

On a GPU one kernel each, where plain torch launches two to seven; on a CPU the compiler puts them together.
"""

import torch

from kernels import reference_layer
from kernels.dispatch import _on_gpu

WIDEST = 2**14  # numbers of a row that one program of a kernel holds


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_layer.add_rms_norm`."""
    fits = x.ndim == 2 and weight.shape == x.shape[1:] and (delta is None or delta.shape == x.shape)
    if not fits or weight.dtype != x.dtype or (delta is not None and delta.dtype != x.dtype):
        raise ValueError(f"x {_said(x)}, delta {_said(delta)} and weight {_said(weight)} do not belong together")
    if _on_gpu(x, weight) and x.shape[1] <= WIDEST:
        from kernels.triton import layer

        return layer.add_rms_norm(x, delta, weight, eps)
    return reference_layer.add_rms_norm(x, delta, weight, eps)


def rotate(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """`reference_layer.rotate`."""
    fits = rows.ndim == 3 and rows.shape[2] % 2 == 0 and cos.shape == sin.shape == (rows.shape[0], rows.shape[2])
    fits = fits and (weight is None or (weight.shape == rows.shape[2:] and weight.dtype == rows.dtype))
    if not fits or not rows.dtype == cos.dtype == sin.dtype:
        parts = f"rows {_said(rows)}, cos {_said(cos)}, sin {_said(sin)} and weight {_said(weight)}"
        raise ValueError(f"{parts} do not belong together")
    if _on_gpu(rows, cos) and rows.shape[2] <= WIDEST and rows.stride(2) == 1:
        from kernels.triton import layer

        return layer.rotate(rows, cos, sin, weight, eps)
    return reference_layer.rotate(rows, cos, sin, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference_layer.silu_mul`."""
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {_said(gate)} and up {_said(up)} do not belong together")
    if _on_gpu(gate, up) and gate.stride(1) == up.stride(1) == 1:
        from kernels.triton import layer

        return layer.silu_mul(gate, up)
    return reference_layer.silu_mul(gate, up)


def _said(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
