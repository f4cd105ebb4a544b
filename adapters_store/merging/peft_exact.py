"""PEFT 0.21.2's `LoraModel.add_weighted_adapter`, tensor for tensor, in float32, with all that is odd about it.

- `linear`, `ties`, `dare_*` and `magnitude_prune` act on A and on B separately, so that terms B_i A_j come in; on A the
  factor is sign(c) sqrt|c|, on B sqrt|c|, c = weight * scale.
- Signs are elected among the unweighted entries; a draw is +.
- One adapter is always merged by `linear`.
- If the first adapter uses rsLoRA, so does the result: its scale is sqrt(rank), not 1.
- `cat` fills up with zeros to the sum of the adapters' largest ranks.
- PEFT's random numbers are torch's global ones; here they are those of a generator.

Sources: peft/tuners/lora/model.py and peft/utils/merge_utils.py, release 0.21.2 (Apache-2.0).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.merging.operators import Majority
from adapters_store.merging.parts import Part, Stack


@dataclass(frozen=True, slots=True)
class Combination:
    """What `add_weighted_adapter` is told. kind: its `combination_type`; rank, clamp: `svd_rank`, `svd_clamp`."""

    kind: str
    rank: int | None = None
    clamp: float | None = None
    density: float = 1.0
    majority: Majority = "total"


def merged(stack: Stack, told: Combination, generator: torch.Generator) -> LowRank:
    """The module's delta as PEFT makes it. Raises AdapterInvalid `ranks_differ`, `rank_limit` or `feature_unsupported`
    where PEFT raises, or would lose a bias."""
    if any(part.form.bias is not None for part in stack.parts):
        text = f"`{stack.name}` has a bias, which PEFT would leave out. Use the mode `corrected`."
        raise AdapterInvalid(text, code="feature_unsupported", param="sources")
    kind = "linear" if len(stack.ranks) == 1 else told.kind
    if kind == "cat":
        a, b, allocated = *_concatenated(stack), sum(stack.ranks)
    elif kind.endswith("svd"):
        allocated = told.rank or max(stack.ranks)
        a, b = _of_deltas(stack, kind.removesuffix("svd").removesuffix("_"), allocated, told, generator)
    else:
        allocated = max(stack.ranks)
        a, b = _of_factors(stack, kind, told, generator)
    scale = math.sqrt(allocated) if stack.rslora else 1.0
    return LowRank(a, b, torch.full((len(a),), scale * stack.spec.scale))


def _factors(stack: Stack, part: Part) -> tuple[torch.Tensor, torch.Tensor, float]:
    """PEFT's A, B and scale; where the ranks have scales of their own they go into B."""
    d = part.form.d / stack.spec.scale
    a, b = part.form.a.float(), part.form.b.float()
    return (a, b, float(d[0])) if bool((d == d[0]).all()) else (a, b * d, 1.0)


def _concatenated(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    found = [(part.weight, *_factors(stack, part)) for part in stack.parts]
    filled = sum(stack.ranks) - sum(len(a) for _, a, _, _ in found)
    a = torch.cat([a * weight * scale for weight, a, _, scale in found])
    b = torch.cat([b for _, _, b, _ in found], dim=1)
    return torch.nn.functional.pad(a, (0, 0, 0, filled)), torch.nn.functional.pad(b, (0, filled))


def _of_factors(
    stack: Stack, kind: str, told: Combination, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(set(stack.ranks)) > 1 or len({part.form.rank for part in stack.parts}) > 1:
        text = f"PEFT's `{kind}` takes adapters of one rank only. Use the mode `corrected`, or another method."
        raise AdapterInvalid(text, code="ranks_differ", param="sources")
    found = [(part.weight, *_factors(stack, part)) for part in stack.parts]
    factors = [weight * scale for weight, _, _, scale in found]
    roots = torch.tensor([math.sqrt(abs(factor)) for factor in factors])
    signed = torch.tensor([math.sqrt(abs(factor)) * (1 if factor >= 0 else -1) for factor in factors])
    a = _combined(kind, [a for _, a, _, _ in found], signed, told, generator)
    return a, _combined(kind, [b for _, _, b, _ in found], roots, told, generator)


def _of_deltas(
    stack: Stack, kind: str, rank: int, told: Combination, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds all dense deltas of the module about three times, in float32."""
    if rank > min(stack.spec.in_features, stack.spec.out_features):
        text = f"`{stack.name}` has no {rank} singular values. Lower `rank`."
        raise AdapterInvalid(text, code="rank_limit", param="rank")
    across = stack.spec.kind != "linear"  # PEFT keeps such a delta transposed
    deltas = []
    for part in stack.parts:
        a, b, scale = _factors(stack, part)
        product = b @ a
        deltas.append((product.T if across else product) * scale)
    weights = torch.tensor([part.weight for part in stack.parts])
    delta = _combined(kind or "linear", deltas, weights, told, generator)
    u, s, vh = torch.linalg.svd(delta.T if across else delta, full_matrices=False)
    u, vh = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
    if told.clamp is not None:
        high = _quantile(torch.cat([u.flatten(), vh.flatten()]), told.clamp)
        u, vh = u.clamp(-high, high), vh.clamp(-high, high)
    return vh.contiguous(), u.contiguous()


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """`torch.quantile`, which takes 16 million values at most; of more, where PEFT raises, the nearest is taken."""
    if values.numel() <= 1 << 24:
        return torch.quantile(values, share)
    return values.kthvalue(1 + round(share * (values.numel() - 1))).values


def _combined(
    kind: str, tensors: Sequence[torch.Tensor], weights: torch.Tensor, told: Combination, generator: torch.Generator
) -> torch.Tensor:
    if kind in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, told.density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        tensors = [_random(tensor, told.density, generator) for tensor in tensors]
    stack = torch.stack(list(tensors))
    weighted = stack * weights.view(-1, *[1] * (stack.dim() - 1))
    if kind not in ("ties", "dare_ties"):
        return weighted.sum(dim=0)
    votes = stack.sum(dim=0) if told.majority == "total" else stack.sign().sum(dim=0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def _random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * kept / density
