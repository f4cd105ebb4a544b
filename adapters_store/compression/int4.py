"""Factors in 4 bits, with a float16 scale per group of numbers in a rank, and the scale of the rank in `d`.

4.25 bits a number with groups of 64: an adapter of 4.9 M parameters takes 2.6 MB.
"""

from dataclasses import dataclass

import torch

from adapters_store.compression.singular import distance, singular_form
from adapters_store.forms import LowRank

LARGEST = 7  # of -7 to 7: symmetric, so that a factor and its negative round alike
GROUP = 64
OFFSET = 8  # added to a number, which makes its four bits unsigned
# Shares of a group's largest magnitude that its range may end at: at 4 bits, cutting off one outlier can be nearer.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of 4-bit numbers. numbers: uint8 [rows, ceil(columns / 2)], the even column in the low half, each plus 8;
    scales: float16 [rows, ceil(columns / group)]; columns, group: counts."""

    numbers: torch.Tensor
    scales: torch.Tensor
    columns: int
    group: int

    @property
    def bytes(self) -> int:
        return self.numbers.numel() + 2 * self.scales.numel()


@dataclass(frozen=True, slots=True)
class Int4LowRank:
    """A low-rank delta. a: [r, in]; b: B transposed, [r, out]; d: float32 [r]; bias: float32 [out] or None."""

    a: Packed
    b: Packed
    d: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        vectors = [self.d, *([] if self.bias is None else [self.bias])]
        return self.a.bytes + self.b.bytes + 4 * sum(vector.numel() for vector in vectors)

    def form(self) -> LowRank:
        """What it means, with float32 factors."""
        return LowRank(unpack(self.a), unpack(self.b).T.contiguous(), self.d, self.bias)


def pack(values: torch.Tensor, group: int = GROUP) -> Packed:
    """Rows [rows, columns] to the nearest 4-bit numbers, of several ranges per group the one of least squared error.

    The last group of a row may be shorter. Magnitudes up to 1 (a float16 scale holds no more than 65504).
    """
    rows, columns = values.shape
    grouped = torch.nn.functional.pad(values.double(), (0, -columns % group)).view(rows, -1, group)
    whole = grouped.abs().amax(dim=2, keepdim=True) / LARGEST
    best = torch.full_like(whole, torch.inf)
    steps, scales = torch.zeros_like(grouped), torch.zeros_like(whole)
    for share in RANGES:
        scale = (whole * share).half().double()
        tried = (grouped / torch.where(scale > 0, scale, 1.0)).round().clamp(-LARGEST, LARGEST)
        error = ((tried * scale - grouped) ** 2).sum(dim=2, keepdim=True)
        steps, scales = torch.where(error < best, tried, steps), torch.where(error < best, scale, scales)
        best = torch.minimum(best, error)
    numbers = (steps.view(rows, -1)[:, :columns] + OFFSET).to(torch.uint8)
    numbers = torch.nn.functional.pad(numbers, (0, columns % 2))
    return Packed(numbers[:, ::2] | (numbers[:, 1::2] << 4), scales.squeeze(2).half(), columns, group)


def unpack(packed: Packed) -> torch.Tensor:
    """The rows in float32 [rows, columns]: number times scale."""
    pairs = torch.stack([packed.numbers & 15, packed.numbers >> 4], dim=2)
    numbers = pairs.flatten(1)[:, : packed.columns].float() - OFFSET
    return numbers * packed.scales.float().repeat_interleave(packed.group, dim=1)[:, : packed.columns]


def quantized(form: LowRank, group: int = GROUP) -> tuple[Int4LowRank, float]:
    """The delta in 4 bits, as it is or in its singular form, whichever is nearer; and the Frobenius distance."""
    singular = singular_form(form)
    balanced = singular.balanced(len(singular.s), torch.float64)
    found = [_rounded(LowRank(each.a, each.b, each.d, form.bias), group) for each in (form, balanced)]
    return min(((each, distance(form, each.form())) for each in found), key=lambda pair: pair[1])


def _rounded(form: LowRank, group: int) -> Int4LowRank:
    """Each rank's factors are scaled to a largest magnitude of 1, which `d` makes good."""
    a, a_scale = _unit(form.a.double())
    b, b_scale = _unit(form.b.double().T)
    return Int4LowRank(pack(a, group), pack(b, group), (form.d.double() * a_scale * b_scale).float(), form.bias)


def _unit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = values.abs().amax(dim=1)
    return values / torch.where(scale > 0, scale, 1.0)[:, None], scale
