"""LoRAs whose two factors mean something else than PEFT's: Block-LoRA (arXiv 2501.16720), ALLoRA (arXiv 2410.09692),
LoRAM (arXiv 2502.13533)."""

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad
from adapters_store.forms import LowRank
from adapters_store.safetensors_header import DTYPES, INDICES

_A, _B = "lora_A.weight", "lora_B.weight"
_INPUTS, _OUTPUTS = "loram_pruned_inputs", "loram_pruned_outputs"


class BlockLoraConfig(OutsideConfig):
    """n_blocks: how many blocks B has beside one another; A is the one that they share."""

    n_blocks: int


def _check_blocks(config: BlockLoraConfig) -> None:
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if config.n_blocks < 1 or any(rank % config.n_blocks for rank in ranks):
        bad("has a rank that is no multiple of `n_blocks`", "n_blocks")


def _block_shapes(target: Target) -> Shapes:
    outside.linear(target)
    return {_A: (target.rank // target.file.config.n_blocks, target.inputs), _B: (target.outputs, target.rank)}


def _block_forms(target: Target) -> list[LowRank]:
    """`alpha / r * (B_1 + ... + B_n) A`."""
    a, b = target.tensor(_A), target.tensor(_B)
    summed = b.double().view(target.outputs, target.file.config.n_blocks, -1).sum(1).float()
    return [LowRank(a, summed, torch.full((len(a),), outside.scale(target), dtype=torch.float32))]


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    return {_A: (target.rank, target.inputs), _B: (target.outputs, target.rank)}


def _unscaled_forms(target: Target) -> list[LowRank]:
    """`B A`, whatever alpha the config has."""
    return [_low_rank(target.raw(_A), target.raw(_B), 1.0)]


def _pruned_shapes(target: Target) -> Shapes:
    """A lacks the inputs that training had pruned away, B the outputs."""
    outside.linear(target)
    shapes: dict[str, tuple[int, ...]] = {}
    left = {_INPUTS: target.inputs, _OUTPUTS: target.outputs}
    for part in left:
        if part in target:
            shape = target.entries[part].shape
            count = shape[0] if len(shape) == 1 else 0
            shapes[part] = (count,)
            left[part] -= count
    return {_A: (target.rank, left[_INPUTS]), _B: (left[_OUTPUTS], target.rank), **shapes}


def _pruned_forms(target: Target) -> list[LowRank]:
    """`alpha / r * B A` with zeros at the pruned inputs of A and the pruned outputs of B."""
    a = _recovered(target, target.raw(_A).T, _INPUTS, target.inputs).T.contiguous()
    b = _recovered(target, target.raw(_B), _OUTPUTS, target.outputs)
    return [_low_rank(a, b, outside.scale(target))]


def _recovered(target: Target, rows: torch.Tensor, part: str, count: int) -> torch.Tensor:
    """rows: [count - pruned, r] in order; back to [count, r]."""
    if part not in target:
        return rows
    pruned = target.indices(part, count)
    kept = torch.ones(count, dtype=torch.bool)
    kept[pruned] = False
    if int(kept.sum()) != len(rows):
        target.refuse(f"names a position twice in `{part}`", "bad_index")
    found = rows.new_zeros(count, rows.shape[1])
    found[kept] = rows
    return found


def _low_rank(a: torch.Tensor, b: torch.Tensor, scale: float) -> LowRank:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return LowRank(a.to(dtype), b.to(dtype), torch.full((len(a),), scale, dtype=torch.float32))


METHODS = (
    Method(
        kind="block_lora",
        peft_type="BLOCK_LORA",
        config=BlockLoraConfig,
        served="folded",
        note="A LoRA of rank r / n: the blocks of B share A, so they are summed.",
        source="arXiv 2501.16720",
        parts=frozenset({_A, _B}),
        shapes=_block_shapes,
        forms=_block_forms,
        check=_check_blocks,
    ),
    Method(
        kind="allora",
        peft_type="ALLORA",
        config=PeftConfig,
        served="folded",
        note="A LoRA without a scaling factor: the config's alpha is not used.",
        source="arXiv 2410.09692",
        parts=frozenset({_A, _B}),
        shapes=_shapes,
        forms=_unscaled_forms,
        check=outside.check_lora,
    ),
    Method(
        kind="loram",
        peft_type="LORAM",
        config=PeftConfig,
        served="folded",
        note="A LoRA trained on a pruned base, with zeros at the pruned places; a recovered file is a plain LORA.",
        source="arXiv 2502.13533",
        parts=frozenset({_A, _B, _INPUTS, _OUTPUTS}),
        dtypes=DTYPES | INDICES,
        shapes=_pruned_shapes,
        forms=_pruned_forms,
        check=outside.check_lora,
    ),
)
