"""Ranks added while training, a piece at a time: TriAdaptLoRA (arXiv 2501.08008), IncreLoRA (arXiv 2308.12043)."""

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.kinds.outside import OutsideConfig
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import bad
from adapters_store.forms import LowRank

_EPSILON = 1e-5  # both divide by the rank without ever dividing by zero
_PIECES = 1024  # of one module, more than any training adds
_TRI = ("lora_A", "lora_B", "lora_C_row", "lora_C_col")
_INCRE = ("lora_A", "lora_B", "lora_E")


class TriAdaptLoraConfig(PeftConfig):
    """adapter_config.json of the authors' fork of PEFT. All but alpha was for training."""

    reference_rank: int = 8
    init_rank: int = 1
    init_warmup: int = 0
    incre_interval: int = 1
    top_k: int = 1
    orth_reg_weight: float = 0.5
    weight_decay: float = 0.0
    rank_growth_model: str = "linear"
    incre_rank_num: int | None = None
    total_step: int | None = None
    target_total_rank: int | None = None


def _ranks(target: Target) -> list[int]:
    """Of each piece of A, as the header has them: `lora_A.0`, `lora_A.1`, ..."""
    outside.linear(target)
    found: list[int] = []
    while (part := f"lora_A.{len(found)}") in target:
        shape = target.entries[part].shape
        found.append(shape[0] if shape else 0)
    return found or [0]


def _tri_shapes(target: Target) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    before = 0
    for index, rank in enumerate(_ranks(target)):
        before += rank
        shapes |= {f"lora_A.{index}": (rank, target.inputs), f"lora_B.{index}": (target.outputs, rank)}
        shapes |= {f"lora_C_row.{index}": (rank, before), f"lora_C_col.{index}": (before, rank)}
    return shapes


def _tri_forms(target: Target) -> list[LowRank]:
    """`alpha / (R + 1e-5) * B (C_row + C_col) A`: a row piece fills C up to the diagonal, a column piece likewise."""
    ranks = _ranks(target)
    total, first = sum(ranks), 0
    target.bound_rank(total)
    core = torch.zeros(total, total, dtype=torch.float64)
    for index, rank in enumerate(ranks):
        last = first + rank
        core[first:last, :last] += target.tensor(f"lora_C_row.{index}").double()
        core[:last, first:last] += target.tensor(f"lora_C_col.{index}").double()
        first = last
    a, b = _joined(target, "lora_A", len(ranks), 0), _joined(target, "lora_B", len(ranks), 1)
    alpha = target.alpha(target.file.config.lora_alpha)
    d = torch.full((total,), alpha / (total + _EPSILON), dtype=torch.float32)
    return [LowRank(a, (b.double() @ core).float(), d)]


def _incre_shapes(target: Target) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"ranknum": (1,)}
    for index, rank in enumerate(_ranks(target)):
        shapes |= {f"lora_A.{index}": (rank, target.inputs), f"lora_B.{index}": (target.outputs, rank)}
        shapes[f"lora_E.{index}"] = (rank, 1)
    return shapes


def _incre_forms(target: Target) -> list[LowRank]:
    """`alpha / (ranknum + 1e-5) * B (E A)`; pieces kept in reserve act, though `ranknum` does not count them."""
    count = len(_ranks(target))
    alpha = target.alpha(target.file.config.lora_alpha)
    rank = float(target.tensor("ranknum"))
    d = _joined(target, "lora_E", count, 0).flatten() * (alpha / (rank + _EPSILON))
    kept = d != 0
    a, b = _joined(target, "lora_A", count, 0)[kept], _joined(target, "lora_B", count, 1)[:, kept]
    return [LowRank(a, b.contiguous(), d[kept])] if bool(kept.any()) else []


def _joined(target: Target, name: str, count: int, dimension: int) -> torch.Tensor:
    return torch.cat([target.tensor(f"{name}.{index}") for index in range(count)], dimension)


def _check(config: OutsideConfig | PeftConfig) -> None:
    if config.lora_alpha <= 0:
        bad("has a `lora_alpha` that is not positive; the method then scales by a rank of training", "lora_alpha")
    if isinstance(config, PeftConfig):
        outside.check_lora(config)


METHODS = (
    Method(
        kind="triadaptlora",
        peft_type="TRIADAPTLORA",
        config=TriAdaptLoraConfig,
        served="folded",
        note="A low-rank delta of the ranks grown; the triangular cores go into B.",
        source="arXiv 2501.08008",
        parts=frozenset(f"{name}.{index}" for name in _TRI for index in range(_PIECES)),
        shapes=_tri_shapes,
        forms=_tri_forms,
        check=_check,
    ),
    Method(
        kind="increlora",
        peft_type="INCRELORA",
        config=OutsideConfig,
        served="folded",
        note="A low-rank delta of the ranks grown; the singular values become scales.",
        source="arXiv 2308.12043",
        parts=frozenset(f"{name}.{index}" for name in _INCRE for index in range(_PIECES)) | {"ranknum"},
        shapes=_incre_shapes,
        forms=_incre_forms,
        check=_check,
    ),
)
