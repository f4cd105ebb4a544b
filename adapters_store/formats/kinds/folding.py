"""What the methods share that fold to a delta: which form it takes, and what none of them serves."""

from typing import Any

import torch

from adapters_store.canonical import shorten
from adapters_store.formats.method import Target
from adapters_store.formats.tuner_config import bad, unsupported
from adapters_store.forms import Dense, Form, LowRank, OutputScale

_SEEDS = 1 << 62  # torch takes 64 bits; what is added to a seed must fit too


def refuse_bias(config: Any) -> None:
    """Raises AdapterInvalid `feature_unsupported` for a config that trains the base's biases."""
    if config.bias != "none":
        unsupported([f'bias "{shorten(config.bias, 40)}"'])


def refuse_seed(config: Any, name: str) -> None:
    """Raises AdapterInvalid `bad_config` for a seed that no generator takes."""
    if not 0 <= getattr(config, name) < _SEEDS:
        bad(f"needs `{name}` of 0 to 2**62", name)


def refuse_kinds(target: Target, *kinds: str) -> None:
    """kinds: of `ModuleSpec`, which PEFT's own layers of the method do not adapt. Raises AdapterInvalid."""
    if target.spec.kind in kinds:
        target.refuse(f"is of kind {target.spec.kind}, which the method does not adapt", "feature_unsupported")


def fits(target: Target, rank: int) -> bool:
    """Whether a low-rank delta is allowed, and smaller than a dense one."""
    if target.spec.kind == "embedding":
        return True  # there is no other form
    within = rank <= target.file.limits.max_rank
    return within and rank * (target.inputs + target.outputs) < target.inputs * target.outputs


def delta(
    target: Target,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> list[Form]:
    """`B diag(d) A` and a bias in the smaller of two forms, float32. a: [r, in]; b: [out, r]; d: [r], or None for
    ones; bias: [out]."""
    d = torch.ones(a.shape[0]) if d is None else d
    if fits(target, a.shape[0]):
        return [LowRank(a.float().contiguous(), b.float().contiguous(), d.float(), bias)]
    moved: list[Form] = [] if bias is None else [OutputScale(bias=bias)]
    return [*dense((b.double() * d.double()) @ a.double()), *moved]


def dense(weight: torch.Tensor) -> list[Form]:
    """weight: [out, in]; float32 is kept of it."""
    return [Dense(weight.float().contiguous(), torch.ones(weight.shape[0]))]
