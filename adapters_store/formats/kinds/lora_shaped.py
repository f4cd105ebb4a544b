"""LoRAs whose factors have other shapes, or that bring tensors of training only: QA-LoRA (arXiv 2309.14717), BD-LoRA
(`BdLoraConfig` of PEFT), VeLoRA (arXiv 2405.17991), MonteCLoRA (`MontecloraConfig` of PEFT)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from adapters_store.formats.kinds import lora_parts
from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.method import Method, Shape, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad
from adapters_store.forms import LowRank

_A, _B = "lora_A.weight", "lora_B.weight"
_EMBED = "lora_velora_embed"
_SAMPLER = "lora_monteclora_sampler"


def _number(fields: Mapping[str, Any] | bool | None, config: str, name: str) -> int:
    """A whole number of at least 1 in a part of the config."""
    value = fields.get(name) if isinstance(fields, Mapping) else None
    if not isinstance(value, int) or value < 1:
        bad(f"needs a whole number `{name}` of at least 1 in `{config}`", config)
    return value


def _narrow(target: Target, part: str, columns: int, count: int) -> bool:
    """Whether a factor of so many columns has `count` times fewer in the file."""
    return count > 1 and target.length(part, -1) * count == columns


def _qalora_shapes(target: Target) -> dict[str, Shape]:
    """PEFT pools inputs over GPTQ layers only; over others the config's field does nothing, and A is whole."""
    found, group = lora_parts.shapes(target), target.file.config.qalora_group_size or 0
    if _narrow(target, _A, target.inputs, group):
        found[_A] = (target.rank, target.inputs // group)
    return found


def _qalora(target: Target) -> list[LowRank]:
    """Each input gets the weight of its group: the mean of the group, times the number of groups."""
    found, group = lora_parts.low_rank(target), target.file.config.qalora_group_size
    if not _narrow(target, _A, target.inputs, group or 0):
        return [found]
    return [LowRank(found.a.repeat_interleave(group, dim=1), found.b, found.d * found.a.shape[1] / group, found.bias)]


def _bdlora_shapes(target: Target) -> dict[str, Shape]:
    refuse_kinds(target, "embedding", "conv1d")
    found, count = lora_parts.shapes(target), _number(target.file.config.use_bdlora, "use_bdlora", "nblocks")
    if _narrow(target, _A, target.inputs, count) and target.rank % count == 0:
        found[_A] = (target.rank, target.inputs // count)
    elif _narrow(target, _B, target.rank, count) and target.outputs % count == 0:
        found[_B] = (target.outputs, target.rank // count)
    return found


def _bdlora(target: Target) -> list[LowRank]:
    """Blocks on the diagonal, zeros elsewhere: of A or of B, whichever is narrow in the file."""
    found, count = lora_parts.low_rank(target), _number(target.file.config.use_bdlora, "use_bdlora", "nblocks")
    a, b = found.a, found.b
    if _narrow(target, _A, target.inputs, count):
        a = _diagonal(a, count)
    elif _narrow(target, _B, target.rank, count):
        b = _diagonal(b, count)
    return [LowRank(a, b, found.d, found.bias)]


def _diagonal(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Each of `count` equal parts of the rows reads its own part of `count` times as many columns."""
    height, width = rows.shape[0] // count, rows.shape[1]
    found = torch.zeros(count, height, count, width, dtype=rows.dtype)
    for block in range(count):
        found[block, :, block] = rows[block * height : (block + 1) * height]
    return found.view(rows.shape[0], count * width)


def _velora_shapes(target: Target) -> dict[str, Shape]:
    groups = _number(target.file.config.velora_config, "velora_config", "num_groups")
    return lora_parts.shapes(target) | {_EMBED: (-(-target.inputs // groups),)}


def _monteclora_shapes(target: Target) -> dict[str, Shape]:
    samples = _number(target.file.config.monteclora_config, "monteclora_config", "num_samples")
    sizes: dict[str, Shape] = {"std_prior": (target.rank,), "gaussian_var_prior": (target.rank, target.rank)}
    sizes |= {"expert_weights_prior": (samples,), "expert_weights": (samples,)}
    return lora_parts.shapes(target) | {f"{_SAMPLER}.{part}": size for part, size in sizes.items()}


def _plain(target: Target) -> list[LowRank]:
    return [lora_parts.low_rank(target)]


def _method(
    kind: str,
    field: str,
    shapes: Callable[[Target], dict[str, Shape]],
    forms: Callable[[Target], list[LowRank]],
    note: str,
    source: str,
    parts: frozenset[str] = frozenset(),
) -> Method:
    """field: of the config, which says that the method is used."""
    return Method(
        kind=kind,
        peft_type="LORA",
        config=PeftConfig,
        served="folded",
        note=note,
        source=source,
        parts=lora_parts.PARTS | parts,
        shapes=shapes,
        forms=forms,
        check=lambda config: lora_parts.check(config, {field}),
        when=lambda fields: bool(fields.get(field)),
    )


_SAMPLER_PARTS = ("std_prior", "gaussian_var_prior", "expert_weights_prior", "expert_weights")
METHODS = (
    _method(
        "qalora",
        "use_qalora",
        _qalora_shapes,
        _qalora,
        "A LoRA of rank r, A repeated over each group of inputs.",
        "arXiv 2309.14717",
    ),
    _method(
        "bdlora",
        "use_bdlora",
        _bdlora_shapes,
        _bdlora,
        "A LoRA of rank r, its blocks written out.",
        "PEFT's BdLoraConfig",
    ),
    _method(
        "velora",
        "velora_config",
        _velora_shapes,
        _plain,
        "A LoRA as any other; what compressed activations while training is left out.",
        "arXiv 2405.17991",
        frozenset({_EMBED}),
    ),
    _method(
        "monteclora",
        "monteclora_config",
        _monteclora_shapes,
        _plain,
        "A LoRA as any other; the distributions that training drew from are left out, as PEFT does when it answers.",
        "PEFT's MontecloraConfig",
        frozenset(f"{_SAMPLER}.{part}" for part in _SAMPLER_PARTS),
    ),
)
