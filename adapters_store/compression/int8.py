"""Factors in 8 bits, one scale per rank row of A and per column of B, both folded into `d`: nothing else changes.

A scale per rank makes the rounding indifferent to how a rank's norm is shared between its two factors. What helps is
the singular form: its ranks are orthogonal, so that no two large ones cancel and leave their rounding errors behind.
"""

import torch

from adapters_store.compression.singular import distance, singular_form
from adapters_store.forms import LowRank

LARGEST = 127  # of -127 to 127: symmetric, so that a factor and its negative round alike


def rounded(form: LowRank) -> LowRank:
    """The same ranks with int8 a [r, in] and b [out, r]: `a ~ a8 * scale`, the scales float32 within `d`.

    Source: absmax quantisation as in LLM.int8() (arXiv 2208.07339) section 2, a vector at a time.
    """
    a, a_scale = _rows(form.a.double())
    b, b_scale = _rows(form.b.double().T)
    return LowRank(a, b.T.contiguous(), (form.d.double() * a_scale * b_scale).float(), form.bias)


def quantized(form: LowRank) -> tuple[LowRank, float]:
    """The delta in int8, rounded as it is or in its singular form, whichever is nearer; and the distance.

    The distance is that of Frobenius, exact; the singular form has rank min(rank, in, out).
    """
    singular = singular_form(form)
    balanced = singular.balanced(len(singular.s), torch.float64)
    found = [rounded(LowRank(each.a, each.b, each.d, form.bias)) for each in (form, balanced)]
    return min(((each, distance(form, each)) for each in found), key=lambda pair: pair[1])


def _rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows and their scales [rows]; a row of zeros has the scale 0."""
    scale = values.abs().amax(dim=1) / LARGEST
    steps = values / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().to(torch.int8), scale
