"""MiSS (arXiv 2409.15371): inputs summed in strides of r, then one matrix; its "bat" start multiplies with the base."""

from typing import Literal

import torch

from adapters_store.formats.kinds.folding import delta, dense, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form


class MissConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True  # not of the start only: it says what the block means
    bias: str = "none"


def _check(config: MissConfig) -> None:
    refuse_bias(config)
    if config.mini_r < 1:
        bad("needs `mini_r` of at least 1", "mini_r")


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    config = target.file.config
    if config.init_weights == "bat":
        if target.inputs % config.r or target.outputs % config.r:
            target.refuse(f"is {target.outputs} x {target.inputs}, which blocks of {config.r} do not fill")
        return {"miss_block": (target.outputs // config.r, config.r, config.r)}
    if config.r > target.inputs:
        target.refuse(f"has {target.inputs} inputs, fewer than the rank {config.r}")
    if config.init_weights == "mini" and target.outputs % config.mini_r:
        target.refuse(f"has {target.outputs} outputs, no multiple of `mini_r` {config.mini_r}")
    return {"miss_block": (config.r, config.mini_r if config.init_weights == "mini" else target.outputs)}


def _forms(target: Target) -> list[Form]:
    """A is of 0 and 1: row j sums the inputs j, j + r, j + 2r, ..."""
    config, block = target.file.config, target.tensor("miss_block")
    if config.init_weights == "bat":
        return dense(_bat(target.weight(), block))
    if config.init_weights == "mini":
        block = block.repeat(1, target.outputs // config.mini_r)
    a = (torch.arange(target.inputs) % config.r == torch.arange(config.r)[:, None]).float()
    return delta(target, a, block.T)


def _bat(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """`W_ij B_i + B_i` for each r x r block ij of the base's weight; weight: [out, in]; block: [out / r, r, r]."""
    count, rank, _ = block.shape
    pieces = weight.view(count, rank, -1, rank).permute(2, 0, 1, 3)
    return (pieces @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)


METHODS = (
    Method(
        kind="miss",
        peft_type="MISS",
        config=MissConfig,
        served="folded",
        note='A LoRA of rank r; with init_weights "bat" a dense delta made from the base\'s weights.',
        source="arXiv 2409.15371",
        parts=frozenset({"miss_block"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
