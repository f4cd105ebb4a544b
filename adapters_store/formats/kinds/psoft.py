"""PSOFT (arXiv 2505.11235): an orthogonal turn, and two scales, inside the base's principal subspace."""

from typing import Literal

import torch

from adapters_store.formats.kinds import decomposed
from adapters_store.formats.kinds.folding import refuse_kinds, refuse_seed
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import SharedBasis

_MAX_STEPS = 64  # of series and of iterations: each is a product of matrices
_PARTS = ("psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a")


class PsoftConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True


def _check(config: PsoftConfig) -> None:
    refuse_seed(config, "random_seed")
    if not (config.num_cayley_neumann_terms <= _MAX_STEPS and 0 <= config.psoft_svd_lowrank_niter <= _MAX_STEPS):
        bad(f"has more than {_MAX_STEPS} terms or iterations", "num_cayley_neumann_terms")
    if config.psoft_alpha <= 0:
        bad("needs a positive `psoft_alpha`", "psoft_alpha")


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    config = target.file.config
    if config.r > min(target.inputs, target.outputs):
        target.refuse(f"is {target.outputs} x {target.inputs}, smaller than the rank {config.r}")
    target.bound_rank(config.r)
    weight = (config.r * (config.r - 1) // 2,) if config.psoft_orth else (config.r, config.r)
    found: dict[str, tuple[int, ...]] = {_PARTS[0]: weight}
    for part, used in ((_PARTS[1], config.psoft_mag_b), (_PARTS[2], config.psoft_mag_a)):
        if used:
            found[part] = (config.r,)
    return found


def _turn(target: Target) -> torch.Tensor:
    """R [r, r]: `psoft.layer.OrthLayer.get_matrix`."""
    config, weight = target.file.config, target.tensor(_PARTS[0]).double()
    turn = _cayley(weight, config) if config.psoft_orth else weight
    if config.psoft_mag_b:
        turn = target.tensor(_PARTS[1]).double()[:, None] * turn
    if config.psoft_mag_a:
        turn = turn * target.tensor(_PARTS[2]).double()
    return turn


def _cayley(weight: torch.Tensor, config: PsoftConfig) -> torch.Tensor:
    """`(I + Q)(I - Q)^-1`, or the first terms of its series."""
    eye = torch.eye(config.r, dtype=weight.dtype)
    skew = torch.zeros_like(eye)
    rows, columns = torch.triu_indices(config.r, config.r, 1)
    skew[rows, columns] = weight
    skew = skew - skew.T
    if not config.use_cayley_neumann:
        solved: torch.Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
        return solved
    norm, bound = float(skew.norm()), config.cayley_neumann_eps
    if bound is not None and norm > bound:
        skew = skew * (bound / (norm + 1e-12))
    last = config.num_cayley_neumann_terms - 1
    last = 3 if last == 2 else last  # PEFT's series of three terms is that of four
    power, found = eye, eye.clone()
    for term in range(1, last + 1):
        power = power @ skew
        found += power * (1 if term == last > 1 else 2)
    return found


def _principal(target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], S [r], V [r, in] of the base's weight."""
    config = target.file.config
    if config.psoft_svd == "full":
        u, s, v = decomposed.singular(target, config.r)
        return u, s[: config.r], v
    numbers = (config.r, config.psoft_svd_lowrank_niter, config.random_seed)
    kept = target.file.base.kept
    u, s, v = kept.get(
        ("randomised", target.name, *numbers), lambda: _randomised(target.weight(factored=True), *numbers)
    )
    return u, s, v


def _randomised(
    weight: torch.Tensor, rank: int, rounds: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch.svd_lowrank` with a generator of its own (Halko et al., arXiv 0909.4061, algorithm 5.1)."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    drawn = torch.randn(tall.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(tall @ drawn).Q
    for _ in range(rounds):
        q = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ q).Q).Q
    u, s, v = torch.linalg.svd(q.T @ tall, full_matrices=False)
    u = q @ u
    return (u, s, v) if tall is weight else (v.T.contiguous(), s, u.T.contiguous())


def _forms(target: Target) -> list[SharedBasis]:
    """`s B (R - I) A`: with U and V as the basis, S and the scales go into the core."""
    u, s, v = _principal(target)
    core = _turn(target) - torch.eye(len(s), dtype=torch.float64)
    if target.file.config.ab_svd_init == "psoft_init":
        core = s.double()[:, None] * core
    else:
        core = s.double().sqrt()[:, None] * core * s.double().sqrt()
    return [SharedBasis(u, v, core.float())]


METHODS = (
    Method(
        kind="psoft",
        peft_type="PSOFT",
        config=PsoftConfig,
        served="native",
        note="A core between the base's principal factors, which must come out with the signs that training had.",
        source="arXiv 2505.11235",
        parts=frozenset(_PARTS),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
