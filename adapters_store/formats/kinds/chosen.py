"""LoRAs of which a request chooses a part: of DyLoRA (arXiv 2210.07558) the rank, of PETALface (arXiv 2412.07771) the
share of its two branches."""

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import LowRank
from adapters_store.variants import Knobs

_A, _B = "lora_A.weight", "lora_B.weight"
# Of each branch, as the authors' layer names them: the first acts by 1 - a, the second by a.
_BRANCHES = tuple((f"trainable_lora_down{n}.weight", f"trainable_lora_up{n}.weight") for n in ("", "2"))


class PetalfaceConfig(TunerConfig):
    """lora_scale: of both branches; gate: the share of the second branch where a request says none."""

    lora_scale: float = 1.0
    gate: float = 0.5


def _dylora_shapes(target: Target) -> Shapes:
    outside.linear(target)
    return {_A: (target.rank, target.inputs), _B: (target.outputs, target.rank)}


def _dylora_forms(target: Target) -> list[LowRank]:
    """`alpha / b * B[:, :b] A[:b]`, b being the chosen rank: trained so that each rank is an adapter of its own."""
    rank = min(target.rank, target.file.variant.rank or target.rank)
    a, b = target.raw(_A)[:rank].clone(), target.raw(_B)[:, :rank].contiguous()
    dtype = torch.promote_types(a.dtype, b.dtype)
    alpha = target.alpha(target.file.config.lora_alpha)
    return [LowRank(a.to(dtype), b.to(dtype), torch.full((rank,), alpha / rank, dtype=torch.float32))]


def _dylora_knobs(file: AdapterFile) -> Knobs:
    return {"rank": {"max": max(target.rank for target in file.targets)}}


def _petalface_check(config: PetalfaceConfig) -> None:
    if not 0 <= config.gate <= 1:
        bad("has a `gate` outside 0 to 1", "gate")


def _petalface_shapes(target: Target) -> Shapes:
    outside.linear(target)
    shapes: dict[str, tuple[int, ...]] = {}
    for down, up in _BRANCHES:
        shapes |= {down: (target.rank, target.inputs), up: (target.outputs, target.rank)}
    return shapes


def _petalface_forms(target: Target) -> list[LowRank]:
    """`s ((1 - a) B_1 A_1 + a B_2 A_2)`. A request's a is a sum of both by weight, where branch 0 is the second."""
    config, branch = target.file.config, target.file.variant.branch
    shares = {None: (1 - config.gate, config.gate), 0: (0.0, 1.0), 1: (1.0, 0.0)}[branch]
    parts = [(*pair, share) for pair, share in zip(_BRANCHES, shares, strict=True) if share]
    a = torch.cat([target.tensor(down) for down, _, _ in parts])
    b = torch.cat([target.tensor(up) for _, up, _ in parts], 1)
    d = torch.tensor([share * config.lora_scale for _, _, share in parts]).repeat_interleave(target.rank)
    return [LowRank(a, b, d)]


def _petalface_knobs(file: AdapterFile) -> Knobs:
    return {"gate": {"default": file.config.gate}}


METHODS = (
    Method(
        kind="dylora",
        peft_type="DYLORA",
        config=OutsideConfig,
        served="native",
        note="A LoRA of which every request may choose the rank.",
        source="arXiv 2210.07558",
        parts=frozenset({_A, _B}),
        shapes=_dylora_shapes,
        forms=_dylora_forms,
        knobs=_dylora_knobs,
    ),
    Method(
        kind="petalface",
        peft_type="PETALFACE",
        config=PetalfaceConfig,
        served="native",
        note="Two LoRAs between which every request may choose the share.",
        source="arXiv 2412.07771",
        parts=frozenset(part for branch in _BRANCHES for part in branch),
        shapes=_petalface_shapes,
        forms=_petalface_forms,
        knobs=_petalface_knobs,
        check=_petalface_check,
    ),
)
