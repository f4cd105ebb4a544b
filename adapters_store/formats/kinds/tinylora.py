"""TinyLoRA (arXiv 2602.04118): a very short vector over random matrices, between two frozen factors of the base."""

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.kinds.folding import refuse_bias, refuse_seed
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import SharedBasis

_PARTS = ("tinylora_A", "tinylora_B", "tinylora_P")


class TinyLoraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool | str = True


def _check(config: TinyLoraConfig) -> None:
    refuse_bias(config)
    refuse_seed(config, "projection_seed")
    if config.u < 1 or not 0 <= config.weight_tying <= 1:
        bad("needs `u` of at least 1 and `weight_tying` of 0 to 1", "u")


def _places(file: AdapterFile) -> dict[str, int]:
    """The number of each module that the config selects, in the base's order: it seeds, and groups."""
    assert file.matcher is not None
    targeted = file.matcher.targeted()
    return {name: place for place, name in enumerate(name for name in file.base.modules if name in targeted)}


def _group(file: AdapterFile, name: str) -> int:
    """Modules of a group use one vector: `TinyLoraModel._create_and_replace`."""
    places = _places(file)
    groups = max(1, round(len(places) * (1.0 - file.config.weight_tying)))
    return int(min(places[name] // max(1, len(places) // groups), groups - 1))


def _common(file: AdapterFile) -> Shapes:
    groups = {_group(file, name) for name in _places(file)}
    return {f"tinylora_v.{group}": (file.config.u,) for group in groups}


def _shapes(target: Target) -> Shapes:
    config, file = target.file.config, target.file
    rank = min(config.r, target.inputs, target.outputs)
    if config.u * rank * rank * 4 * len(file.modules) > file.limits.form_bytes:
        need = f"`u` {config.u} and rank {rank} need random matrices for {len(file.modules)} modules"
        raise AdapterInvalid(
            f"{need} beyond the limit of {file.limits.form_bytes} bytes.",
            code="adapter_too_large",
            param="u",
        )
    # of an embedding PEFT takes the weight as it is stored, [vocabulary, dimension]
    across = (target.inputs, target.outputs) if target.spec.kind == "embedding" else (target.outputs, target.inputs)
    found = {"tinylora_A": (rank, across[1]), "tinylora_B": (across[0], rank)}
    return found | ({"tinylora_P": (config.u, rank, rank)} if config.save_projection else {})


def _forms(target: Target) -> list[SharedBasis]:
    """`B R A`, R the sum of v_i P_i; A and B are the base's, so adapters share them."""
    file, (a, b) = target.file, (target.raw("tinylora_A"), target.raw("tinylora_B"))
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if file.config.save_projection:
        random = target.tensor("tinylora_P")
    else:
        generator = torch.Generator().manual_seed(file.config.projection_seed + _places(file)[target.name])
        size = (file.config.u, len(a), len(a))
        random = torch.normal(mean=0.0, std=1.0 / len(a) ** 0.5, size=size, generator=generator)
    core = torch.einsum("i,ijk->jk", file.tensor(f"tinylora_v.{_group(file, target.name)}"), random)
    if target.spec.kind == "embedding":  # rows of B by token, then R and A; PEFT does not scale this delta
        return [SharedBasis(a.T.contiguous(), b.T.contiguous(), core.T.contiguous())]
    return [SharedBasis(b, a, core)]


METHODS = (
    Method(
        kind="tinylora",
        peft_type="TINYLORA",
        config=TinyLoraConfig,
        served="native",
        note="A small core between two factors of the base, which adapters of one start share in memory.",
        source="arXiv 2602.04118",
        parts=frozenset(_PARTS),
        shapes=_shapes,
        forms=_forms,
        common_parts=frozenset({"tinylora_v"}),
        common=_common,
        check=_check,
    ),
)
