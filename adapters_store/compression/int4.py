"""Factors in 4 bits, with a whole scale of a byte per group of 64 numbers, and the scale of the rank in `d`.

4.125 bits a number: an adapter of 4.9 M parameters takes 2.5 MB.
"""

import torch

from adapters_store.compression.singular import distance, singular_form
from adapters_store.forms import Int4LowRank, Int4Rows, LowRank
from kernels import reference
from kernels.segments import INT4_GROUP

LARGEST = 7  # of -7 to 7: symmetric, so that a factor and its negative round alike
LARGEST_SCALE = 255
# Shares of a group's largest magnitude that its range may end at: at 4 bits, cutting off one outlier can be nearer.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def pack(values: torch.Tensor) -> tuple[Int4Rows, torch.Tensor]:
    """Rows [rows, columns] to the nearest 4-bit numbers, and a float64 scale for each row.

    Of several ranges per group the one of least squared error. Scales of groups are whole multiples of their row's: a
    group whose numbers are all below a 510th of the row's largest becomes zeros.
    """
    rows, columns = values.shape
    row_scale = values.double().abs().amax(dim=1) / (LARGEST * LARGEST_SCALE)
    units = values.double() / torch.where(row_scale > 0, row_scale, 1.0)[:, None]
    grouped = torch.nn.functional.pad(units, (0, -columns % INT4_GROUP)).view(rows, -1, INT4_GROUP)
    whole = grouped.abs().amax(dim=2, keepdim=True) / LARGEST
    best = torch.full_like(whole, torch.inf)
    steps, scales = torch.zeros_like(grouped), torch.zeros_like(whole)
    for share in RANGES:
        scale = (whole * share).round().clamp(1, LARGEST_SCALE)
        tried = (grouped / scale).round().clamp(-LARGEST, LARGEST)
        error = ((tried * scale - grouped) ** 2).sum(dim=2, keepdim=True)
        steps, scales = torch.where(error < best, tried, steps), torch.where(error < best, scale, scales)
        best = torch.minimum(best, error)
    numbers = reference.int4_numbers(steps.view(rows, -1)[:, :columns])
    return Int4Rows(numbers, scales.squeeze(2).to(torch.uint8), columns), row_scale


def quantized(form: LowRank) -> tuple[Int4LowRank, float]:
    """The delta in 4 bits, as it is or in its singular form, whichever is nearer; and the Frobenius distance."""
    singular = singular_form(form)
    balanced = singular.balanced(len(singular.s), torch.float64)
    found = [_rounded(LowRank(each.a, each.b, each.d, form.bias)) for each in (form, balanced)]
    return min(((each, distance(form, each.widened())) for each in found), key=lambda pair: pair[1])


def _rounded(form: LowRank) -> Int4LowRank:
    a, a_scale = pack(form.a)
    b, b_scale = pack(form.b.T)
    return Int4LowRank(a, b, (form.d.double() * a_scale * b_scale).float(), form.bias)
