"""A low-rank delta `dW = B diag(d) A` in its singular form, and its exact norms; dW itself is never formed.

With QR decompositions B diag(d) = Q_b R_b and A^T = Q_a R_a, everything that is asked of dW is asked of the small
`R_b R_a^T`, since the Q have orthonormal columns. All sums run in float64.
"""

import math
from dataclasses import dataclass

import torch

from adapters_store.forms import LowRank


@dataclass(frozen=True, slots=True)
class SingularForm:
    """`dW = U diag(s) V^T`. u: [out, k]; s: [k], descending; v: [in, k]; float64, k = min(rank, in, out)."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    def balanced(self, rank: int, dtype: torch.dtype) -> LowRank:
        """The first `rank` components as B' = U s^(1/2), A' = s^(1/2) V^T, d = 1: each rank's factors have one norm.

        By Eckart and Young (Psychometrika 1, 1936) no delta of this rank is nearer to dW.
        """
        root = self.s[:rank].sqrt()
        a, b = (self.v[:, :rank] * root).T, self.u[:, :rank] * root
        return LowRank(a.to(dtype), b.to(dtype), torch.ones(len(root)))


def singular_form(form: LowRank) -> SingularForm:
    """The singular value decomposition of a delta, its bias left out; cost O((in + out) r^2)."""
    left, left_small, right, right_small = _decomposed(form)
    u, s, vh = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
    return SingularForm(left @ u, s, right @ vh.T)


def norm(form: LowRank) -> float:
    """Frobenius norm of the delta, its bias left out."""
    _, left_small, _, right_small = _decomposed(form)
    return float(torch.linalg.matrix_norm(left_small @ right_small.T))


def distance(one: LowRank, other: LowRank) -> float:
    """Frobenius norm of the difference of two deltas: that of the delta whose ranks are those of both."""
    d = torch.cat([one.d.double(), -other.d.double()])
    a = torch.cat([one.a.double(), other.a.double()])
    return norm(LowRank(a, torch.cat([one.b.double(), other.b.double()], dim=1), d))


def energy_rank(s: torch.Tensor, energy: float) -> int:
    """The least rank, at least 1, that keeps `energy` (0 to 1) of the squared Frobenius norm; s: [k], descending.

    What it drops is `truncation_error(s, rank)` of the delta, at most sqrt(1 - energy).
    """
    kept = (s.double() ** 2).cumsum(0)
    return int((kept < energy * kept[-1]).sum().clamp(max=len(s) - 1)) + 1


def truncation_error(s: torch.Tensor, rank: int) -> float:
    """Relative Frobenius error of the first `rank` components: sqrt(sum of the other s^2 / sum of all s^2)."""
    whole = float(torch.linalg.vector_norm(s))
    return float(torch.linalg.vector_norm(s[rank:])) / whole if whole else 0.0


def relative(error: float, whole: float) -> float:
    """`error / whole`, where nothing lost of nothing is 0."""
    return error / whole if whole else (0.0 if error == 0 else math.inf)


def _decomposed(form: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    left, left_small = torch.linalg.qr(form.b.double() * form.d.double())
    right, right_small = torch.linalg.qr(form.a.double().T)
    return left, left_small, right, right_small
