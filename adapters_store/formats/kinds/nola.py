"""NOLA (arXiv 2310.02556): both factors of a LoRA are sums of random matrices; a file holds the coefficients."""

import math

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import bad
from adapters_store.forms import LowRank

MAX_BASES = 4096  # of each factor: every one costs as many random numbers as the factor has entries
MAX_DRAWS = 1 << 32  # random numbers of one adapter; rank 64 with 1024 bases on Llama-3.1-8B's linears takes 3.3e9
_BLOCK = 1 << 22  # random numbers made at once
_ALPHA, _BETA = "nola_alpha", "nola_beta"


class NolaConfig(OutsideConfig):
    """seed: of both factors' bases, 0 in the authors' code; nola_c: `c` there, the scale being c / r."""

    r: int = 64
    seed: int = 0
    nola_c: float = 1.0


def _check(config: NolaConfig) -> None:
    if not 0 <= config.seed < 1 << 63:
        bad("has a `seed` outside 0 to 2**63 - 1", "seed")


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    target.bound_rank(target.rank)
    return {part: (_bases(target, part),) for part in (_ALPHA, _BETA)}


def _bases(target: Target, part: str) -> int:
    shape = target.entries[part].shape if part in target else ()
    count = shape[0] if shape else 0
    if count > MAX_BASES:
        target.refuse(f"has {count} coefficients in `{part}`; the limit is {MAX_BASES}", "adapter_too_large")
    return count


def _forms(target: Target) -> list[LowRank]:
    """`c / r * B A`, A = sum of alpha_i A_i, B = sum of beta_j B_j.

    The authors seed once for each module, so modules of one shape have one set of bases, which is made once for all.
    """
    target.file.once("nola draws", lambda: _bound_draws(target))
    alike = [other for other in target.file.targets if _key(other) == _key(target)]
    made = target.file.once(f"nola {_key(target)}", lambda: _factors(target.file, alike))
    a, b = made[alike.index(target)]
    return [LowRank(a, b, torch.full((len(a),), target.file.config.nola_c / len(a), dtype=torch.float32))]


def _bound_draws(target: Target) -> None:
    """Whatever the coefficients' counts are, a load draws its bases within half a minute of one core."""
    keys = {_key(other) for other in target.file.targets}
    draws = sum(rank * (alpha * inputs + beta * outputs) for inputs, outputs, rank, alpha, beta in keys)
    if draws > MAX_DRAWS:
        target.refuse(f"and the others need {draws} random numbers; the limit is {MAX_DRAWS}", "adapter_too_large")


def _key(target: Target) -> tuple[int, ...]:
    return (target.inputs, target.outputs, target.rank, _bases(target, _ALPHA), _bases(target, _BETA))


def _factors(file: AdapterFile, alike: list[Target]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r] of every module, all of one shape."""
    first = alike[0]
    size = 4 * first.rank * (first.inputs + first.outputs) * len(alike)
    if size > file.limits.form_bytes:
        first.refuse(f"and modules like it take {size} bytes as served", "adapter_too_large")
    generator = torch.Generator().manual_seed(file.config.seed)
    alphas = torch.stack([target.tensor(_ALPHA) for target in alike])
    betas = torch.stack([target.tensor(_BETA) for target in alike])
    a = _sums(alphas, (first.inputs, first.rank), generator)
    b = _sums(betas, (first.rank, first.outputs), generator)
    return [(a[i].T.contiguous(), b[i].T.contiguous()) for i in range(len(alike))]


def _sums(coefficients: torch.Tensor, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """[modules, *shape]: the bases as `nn.init.kaiming_uniform_(zeros(count, *shape), a=sqrt(5))` makes them.

    That draws one number after another, so the bases may be made a few at a time.
    """
    bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(shape[0] * shape[1])
    found = torch.zeros(len(coefficients), shape[0] * shape[1])
    step = max(1, _BLOCK // (shape[0] * shape[1]))
    for start in range(0, coefficients.shape[1], step):
        some = coefficients[:, start : start + step]
        bases = torch.empty(some.shape[1], shape[0] * shape[1]).uniform_(-bound, bound, generator=generator)
        found += some @ bases
    return found.view(-1, *shape)


METHODS = (
    Method(
        kind="nola",
        peft_type="NOLA",
        config=NolaConfig,
        served="folded",
        note="A LoRA of rank r; its random bases are made again from the seed, with torch's generator of the CPU.",
        source="arXiv 2310.02556",
        parts=frozenset({_ALPHA, _BETA}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
