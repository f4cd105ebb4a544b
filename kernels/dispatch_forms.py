"""The rest of the door (`kernels.dispatch`): kernels of what a module has besides a low-rank part.

On a CPU they are C++; on a GPU they run in plain torch, which waits for the device: such a step is no part of a CUDA
graph.
"""

import torch

from kernels import checks, reference_forms
from kernels.dispatch import _TYPES, _on_cpu
from kernels.segments import Segments


def transform_input(x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`reference_forms.transform_input`."""
    if not len(segments):
        return x
    if _on_cpu(x):
        out: torch.Tensor = torch.ops.polyrank.transform_input(x, pool, forms, *_step(segments))
        return out
    checks.form_rows(x, pool, forms, segments)
    return reference_forms.transform_input(x, pool, forms, segments)


def sparse_delta(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference_forms.sparse_delta`."""
    if not len(segments):
        return y
    if _on_cpu(y) and x.dtype in _TYPES:
        torch.ops.polyrank.sparse_delta_(y, x, pool, forms, *_step(segments))
        return y
    checks.form_product(y, x, pool, forms, segments)
    return reference_forms.sparse_delta(y, x, pool, forms, segments)


def sparse_embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference_forms.sparse_embedding`."""
    if not len(segments):
        return y
    if _on_cpu(y):
        torch.ops.polyrank.sparse_embedding_(y, ids, pool, forms, *_step(segments))
        return y
    checks.form_embedding(y, ids, pool, forms, segments)
    return reference_forms.sparse_embedding(y, ids, pool, forms, segments)


def dense_delta(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference_forms.dense_delta`."""
    if not len(segments):
        return y
    if _on_cpu(y) and x.dtype in _TYPES:
        torch.ops.polyrank.dense_delta_(y, x, pool, forms, *_step(segments))
        return y
    checks.form_product(y, x, pool, forms, segments)
    return reference_forms.dense_delta(y, x, pool, forms, segments)


def scale_output(y: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`reference_forms.scale_output`."""
    if not len(segments):
        return y
    if _on_cpu(y):
        torch.ops.polyrank.scale_output_(y, pool, forms, *_step(segments))
        return y
    checks.form_rows(y, pool, forms, segments)
    return reference_forms.scale_output(y, pool, forms, segments)


def _step(segments: Segments) -> tuple[torch.Tensor, ...]:
    return segments.slot, segments.start, segments.token, segments.weight
