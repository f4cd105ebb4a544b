"""Super-Tuning (arXiv 2607.09287): the largest or smallest entries of a weight are trained, with or without a LoRA."""

import torch

from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.kinds.sparse_rows import compressed
from adapters_store.formats.method import Method, Shape, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form, LowRank
from adapters_store.safetensors_header import DTYPES, INDICES

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


class SupertuningConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. `r` is null without a LoRA."""

    r: int | None = None  # type: ignore[assignment]  # what PEFT writes
    sparsity: float = 0.99
    select_top: bool = True
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True


def _check(config: SupertuningConfig) -> None:
    if not 0 <= config.sparsity < 1:
        bad("has a `sparsity` outside 0 to 1", "sparsity")


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    config = target.file.config
    count = int(target.inputs * target.outputs * (1 - config.sparsity))
    found: dict[str, Shape] = {_VALUES: (count,)}
    if _PLACES in target:
        found[_PLACES] = (count,)
    if config.r is not None:
        target.bound_rank(config.r)
        found |= {_A: (config.r, target.inputs), _B: (target.outputs, config.r)}
    return found


def _forms(target: Target) -> list[Form]:
    config, values = target.file.config, target.tensor(_VALUES)
    count = target.inputs * target.outputs
    place = target.indices(_PLACES, count) if _PLACES in target else _chosen(target, len(values))
    forms: list[Form] = [compressed(place, values, target.outputs, target.inputs)]
    if config.r is not None:
        alpha = 2 * config.r if config.lora_alpha is None else config.lora_alpha
        scale = torch.tensor([alpha / config.r], dtype=torch.float64).float().expand(config.r)
        forms.append(LowRank(target.tensor(_A), target.tensor(_B), scale.contiguous()))
    return forms


def _chosen(target: Target, count: int) -> torch.Tensor:
    """The places again, from the base's weight. Equal magnitudes have no order that two machines agree on."""
    score = target.weight(factored=True).abs().flatten()
    more = min(count + 1, len(score))
    found = score.topk(more, largest=target.file.config.select_top)
    if bool((found.values.diff() == 0).any()):
        target.refuse(
            "was saved without its entries' places, and equal magnitudes in the base leave them open: save it with "
            "`save_precomputed_indices`",
            "feature_unsupported",
        )
    return found.indices[:count]


METHODS = (
    Method(
        kind="supertuning",
        peft_type="SUPERTUNING",
        config=SupertuningConfig,
        served="native",
        note="A sparse delta, and a low-rank one beside it where the file has one.",
        source="arXiv 2607.09287",
        parts=frozenset({_VALUES, _PLACES, _A, _B}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
        dtypes=DTYPES | INDICES,
    ),
)
