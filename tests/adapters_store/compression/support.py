"""Low-rank deltas of many shapes, and what they mean as dense matrices."""

from typing import Any

import torch
from hypothesis import strategies as st

from adapters_store.forms import LowRank


def dense(form: LowRank) -> torch.Tensor:
    """dW in float64 [out, in]."""
    return form.b.double() @ (form.d.double()[:, None] * form.a.double())


def delta(rank: int, inputs: int, outputs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    """Zero-mean random factors."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=generator).to(dtype)
    b = torch.randn(outputs, rank, generator=generator).to(dtype)
    return LowRank(a, b, torch.rand(rank, generator=generator) + 0.5)


@st.composite
def deltas(draw: Any) -> LowRank:
    """Ranks below and above the dimensions; some with repeated ranks, zeros in d, or nothing but zeros."""
    rank, inputs, outputs = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    form = delta(rank, inputs, outputs, draw(st.integers(0, 2**31)), dtype)
    kind = draw(st.sampled_from(["plain", "repeated", "zero d", "zero a", "all zero", "scaled", "negative"]))
    a, b, d = form.a.clone(), form.b.clone(), form.d.clone()
    if kind == "repeated":
        a[:], b[:] = a[:1].clone(), b[:, :1].clone()
    elif kind == "zero d":
        d[:: draw(st.integers(1, 3))] = 0
    elif kind == "zero a":
        a[draw(st.integers(0, rank - 1))] = 0
    elif kind == "all zero":
        b[:] = 0
    elif kind == "scaled":
        a, b = a * 1e-3, b * 1e3
    elif kind == "negative":
        d = -d
    return LowRank(a, b, d)
