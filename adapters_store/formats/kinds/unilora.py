"""Uni-LoRA (arXiv 2506.00799): every number of every factor is one of a single short vector, scaled by how often it
serves."""

import numpy as np
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds, refuse_seed
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import LowRank
from adapters_store.safetensors_header import DTYPES, INDICES

_THETA = "unilora_theta_d"
_BYTES = 32  # per number of a factor, while the places are drawn


class UniLoraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False


def _check(config: UniLoraConfig) -> None:
    refuse_bias(config)
    refuse_seed(config, "proj_seed")
    if config.theta_d_length < 1:
        bad("needs `theta_d_length` of at least 1", "theta_d_length")


def _common(file: AdapterFile) -> Shapes:
    return {_THETA: (file.config.theta_d_length,)}


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    target.bound_rank(target.file.config.r)
    if not target.file.config.save_indices:
        return {}
    a, b = (target.file.config.r, target.inputs), (target.outputs, target.file.config.r)
    return {"unilora_indices_A": a, "unilora_indices_B": b, "unilora_scales_A": a, "unilora_scales_B": b}


def _places(file: AdapterFile) -> tuple[torch.Tensor, torch.Tensor]:
    """Which number of the vector stands at each place of all factors, in the base's order, and the vector's scales.

    Each stands at equally many places, give or take one: `UniLoraModel.generate_index`.
    """
    length, rank = file.config.theta_d_length, file.config.r
    count = sum(rank * (target.inputs + target.outputs) for target in file.targets)
    if count * _BYTES > file.limits.form_bytes:
        raise AdapterInvalid(
            f"The adapter's factors would have {count} numbers; the limit is {file.limits.form_bytes // _BYTES}.",
            code="adapter_too_large",
            param="weights",
        )
    generator = np.random.default_rng(file.config.proj_seed)
    data = np.repeat(np.arange(length), count // length)
    if count % length:
        data = np.concatenate([data, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(data)
    places = torch.from_numpy(data)
    counts = torch.bincount(places, minlength=length)
    return places, torch.where(counts > 0, counts.float().rsqrt(), torch.zeros(length))


def _drawn(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of the vector's numbers."""
    file, rank = target.file, target.file.config.r
    places, scales = file.once("places", lambda: _places(file))
    before = target.file.targets[: target.file.targets.index(target)]
    start = sum(rank * (other.inputs + other.outputs) for other in before)
    values = file.once(_THETA, lambda: file.tensor(_THETA) * scales)
    middle, end = start + rank * target.inputs, start + rank * (target.inputs + target.outputs)
    a, b = values[places[start:middle]], values[places[middle:end]]
    return a.view(rank, target.inputs), b.view(target.outputs, rank)


def _saved(target: Target, factor: str) -> torch.Tensor:
    theta = target.file.tensor(_THETA)
    return theta[target.indices(f"unilora_indices_{factor}", len(theta))] * target.tensor(f"unilora_scales_{factor}")


def _forms(target: Target) -> list[LowRank]:
    saved = target.file.config.save_indices
    a, b = (_saved(target, "A"), _saved(target, "B")) if saved else _drawn(target)
    return [LowRank(a, b, torch.ones(len(a)))]


METHODS = (
    Method(
        kind="unilora",
        peft_type="UNILORA",
        config=UniLoraConfig,
        served="folded",
        note="A LoRA of rank r; which number stands where is saved, or drawn again from the seed.",
        source="arXiv 2506.00799",
        parts=frozenset(f"unilora_{part}_{factor}" for part in ("indices", "scales") for factor in "AB"),
        shapes=_shapes,
        forms=_forms,
        common_parts=frozenset({_THETA}),
        common=_common,
        check=_check,
        implied=True,
        dtypes=DTYPES | INDICES,
    ),
)
