"""VB-LoRA (arXiv 2405.15179): a LoRA whose factors are cut into pieces, each a mixture of a few vectors of one bank."""

import torch

from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import LowRank
from adapters_store.safetensors_header import DTYPES, INDICES

_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_BANK = "vblora_vector_bank"


class VBLoRAConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. Bounds and deviations were for the start of training."""

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1


def _check(config: VBLoRAConfig) -> None:
    refuse_bias(config)
    if config.vector_length < 1 or not 1 <= config.topk <= config.num_vectors:
        bad("needs `vector_length` of at least 1, and `topk` of 1 to `num_vectors`", "topk")


def _common(file: AdapterFile) -> Shapes:
    return {_BANK: (file.config.num_vectors, file.config.vector_length)}


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    config = target.file.config
    if target.inputs % config.vector_length or target.outputs % config.vector_length:
        target.refuse(f"is {target.outputs} x {target.inputs}, no multiples of `vector_length` {config.vector_length}")
    pieces = (config.r, target.inputs // config.vector_length), (target.outputs // config.vector_length, config.r)
    if not config.save_only_topk_weights:
        return {part: (*shape, config.num_vectors) for part, shape in zip(_LOGITS, pieces, strict=True)}
    found = {}
    for part, shape in zip(_LOGITS, pieces, strict=True):
        found[f"{part}_topk_indices"] = (*shape, config.topk)
        found[f"{part}_topk_weights"] = (*shape, config.topk - 1)  # they sum to 1
    return found


def _mixtures(target: Target, part: str) -> torch.Tensor:
    """[.., .., vector_length]: each piece of a factor."""
    config, bank = target.file.config, target.file.once(_BANK, lambda: target.file.tensor(_BANK))
    if not config.save_only_topk_weights:
        logits, indices = target.tensor(part).topk(config.topk, dim=-1)
        weights = logits.softmax(dim=-1)
    else:
        indices = target.indices(f"{part}_topk_indices", config.num_vectors)
        weights = target.tensor(f"{part}_topk_weights")
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    return torch.stack([weights[..., k, None] * bank[indices[..., k]] for k in range(config.topk)]).sum(0)


def _forms(target: Target) -> list[LowRank]:
    """A [r, in]: rows of pieces one after another; B [out, r]: columns of pieces."""
    rank = target.file.config.r
    target.bound_rank(rank)
    a = _mixtures(target, _LOGITS[0]).reshape(rank, target.inputs)
    b = _mixtures(target, _LOGITS[1]).transpose(1, 2).reshape(target.outputs, rank)
    return [LowRank(a, b, torch.ones(rank))]


METHODS = (
    Method(
        kind="vblora",
        peft_type="VBLORA",
        config=VBLoRAConfig,
        served="folded",
        note="A LoRA of rank r, its factors put together from the bank.",
        source="arXiv 2405.15179",
        parts=frozenset(f"{part}{end}" for part in _LOGITS for end in ("", "_topk_indices", "_topk_weights")),
        shapes=_shapes,
        forms=_forms,
        common_parts=frozenset({_BANK}),
        common=_common,
        check=_check,
        dtypes=DTYPES | INDICES,
    ),
)
