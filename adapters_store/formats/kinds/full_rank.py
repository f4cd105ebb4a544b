"""Deltas of full rank: a whole fine-tuning's difference (GaLore, LISA, OwLore, FRUGAL and full fine-tuning), one bit of
it (BitDelta, arXiv 2402.10193), and Bone (arXiv 2409.15371)."""

from typing import Literal

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_plan import weight_shape
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Dense, LowRank, OutputScale, SignRows
from adapters_store.safetensors_header import DTYPES

_DELTA, _SCALE, _BIAS = "delta", "delta_scale", "delta_bias"
_MASK, _COEFF = "mask", "coeff"
_BLOCK = "bone_block"
_WORD = 32  # bits of one of BitDelta's integers


class BoneConfig(TunerConfig):
    """adapter_config.json of PEFT 0.14 to 0.17."""

    r: int = 64
    init_weights: bool | Literal["bat"] = True
    bias: Literal["none"] = "none"


def _delta_shapes(target: Target) -> Shapes:
    outside.linear(target)
    shapes: dict[str, tuple[int, ...]] = {_DELTA: weight_shape(target.spec)}
    for part in (_SCALE, _BIAS):
        if part in target:
            shapes[part] = (target.outputs,)
    if _SCALE not in target and _DELTA in target and not target.entries[_DELTA].dtype.is_floating_point:
        target.refuse(f"holds `{_DELTA}` in whole numbers without `{_SCALE}`")
    return shapes


def _delta_forms(target: Target) -> list[Dense | OutputScale]:
    """`W' - W`, in the file's own type, in the base's layout; of whole numbers, times a scale for each output."""
    delta = target.raw(_DELTA)
    scale = target.tensor(_SCALE) if _SCALE in target else torch.ones(target.outputs)
    forms: list[Dense | OutputScale] = [Dense(delta if target.spec.kind == "linear" else delta.T.contiguous(), scale)]
    if _BIAS in target:
        forms.append(OutputScale(bias=target.tensor(_BIAS)))
    return forms


def _bit_shapes(target: Target) -> Shapes:
    outside.linear(target)
    if target.inputs % _WORD:
        target.refuse(f"has {target.inputs} inputs, no multiple of {_WORD}")
    scalar = target.entries[_COEFF].shape == () if _COEFF in target else True
    return {_MASK: (target.inputs // _WORD, target.outputs), _COEFF: () if scalar else (1,)}


def _bit_forms(target: Target) -> list[Dense]:
    """`coeff * sign`: bit i of integer [k, j] is set where input 32 k + i adds to output j."""
    mask = target.raw(_MASK)
    if mask.dtype != torch.int32:
        target.refuse(f"holds `{_MASK}` in another type than int32", "bad_dtype")
    bits = mask.T.contiguous().view(torch.uint8)  # the bytes of an integer, lowest first: 8 inputs each
    return [Dense(SignRows(bits, target.inputs), target.tensor(_COEFF).expand(target.outputs).contiguous())]


def _bone_shapes(target: Target) -> Shapes:
    outside.linear(target)
    rank = target.rank
    if target.file.config.init_weights != "bat":
        target.bound_rank(rank)
        return {_BLOCK: (rank, target.outputs)}
    if target.inputs % rank or target.outputs % rank:
        target.refuse(f"is {target.outputs} x {target.inputs}, which does not divide into blocks of {rank}")
    return {_BLOCK: (target.outputs // rank, rank, rank)}


def _bone_forms(target: Target) -> list[Dense | LowRank]:
    """The block is added to every r neighbouring inputs, so A sums each r-th input; with "bat", every block of W is
    multiplied by its row's block, which is added, too."""
    block, rank = target.tensor(_BLOCK), target.rank
    if target.file.config.init_weights != "bat":
        a = (torch.arange(target.inputs) % rank == torch.arange(rank)[:, None]).float()
        return [LowRank(a, block.T.contiguous(), torch.ones(rank))]
    pieces = target.weight().view(target.outputs // rank, rank, target.inputs // rank, rank).permute(2, 0, 1, 3)
    changed = (pieces.double() @ block.double() + block.double()).float()
    delta = changed.permute(1, 2, 0, 3).reshape(target.outputs, target.inputs)
    return [Dense(delta, torch.ones(target.outputs))]


METHODS = (
    Method(
        kind="full_delta",
        peft_type="FULL_DELTA",
        config=TunerConfig,
        served="native",
        note="The difference of whole weights, as a dense delta in the file's own type or in 8 bits.",
        source="arXiv 2403.03507 (GaLore), 2403.17919 (LISA), 2405.18380 (OwLore), 2411.07837 (FRUGAL)",
        parts=frozenset({_DELTA, _SCALE, _BIAS}),
        dtypes=DTYPES | {"I8": torch.int8},
        shapes=_delta_shapes,
        forms=_delta_forms,
    ),
    Method(
        kind="bitdelta",
        peft_type="BITDELTA",
        config=TunerConfig,
        served="native",
        note="A dense delta of signs, a bit each, and one scale.",
        source="arXiv 2402.10193",
        parts=frozenset({_MASK, _COEFF}),
        dtypes=DTYPES | {"I32": torch.int32},
        shapes=_bit_shapes,
        forms=_bit_forms,
    ),
    Method(
        kind="bone",
        peft_type="BONE",
        config=BoneConfig,
        served="native",
        note='A LoRA of rank r; with init_weights "bat" a dense delta made from the base\'s weights.',
        source="arXiv 2409.15371",
        parts=frozenset({_BLOCK}),
        shapes=_bone_shapes,
        forms=_bone_forms,
    ),
)
