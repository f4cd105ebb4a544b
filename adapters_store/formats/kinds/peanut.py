"""PEANuT (arXiv 2410.01870): a small network that reads the base's weight, and gives one factor of the delta."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from adapters_store.canonical import shorten
from adapters_store.formats.kinds.folding import delta, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad, unsupported
from adapters_store.forms import Form

_MAX_DEPTH = 64
# those of transformers' ACT2FN that have no numbers of their own
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class PeanutConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True


def _check(config: PeanutConfig) -> None:
    if not 0 <= config.depth <= _MAX_DEPTH:
        bad(f"needs `depth` of 0 to {_MAX_DEPTH}", "depth")
    if config.act_fn not in ACTIVATIONS:
        unsupported([f'act_fn "{shorten(config.act_fn, 40)}" (served are {", ".join(ACTIVATIONS)})'])


def _inner(depth: int) -> list[str]:
    return [f"peanut_{side}.{layer}.weight" for side in ("encoders", "decoders") for layer in range(depth)]


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    rank = target.file.config.r
    inner = dict.fromkeys(_inner(target.file.config.depth), (rank, rank))
    return {"peanut_A.weight": (rank, target.outputs), "peanut_B.weight": (target.outputs, rank), **inner}


def _forms(target: Target) -> list[Form]:
    """`B f(W' A')'`: what f gives of the base's columns is the delta's A."""
    config = target.file.config
    target.bound_rank(config.r)
    act, depth = ACTIVATIONS[config.act_fn], config.depth
    found = act(target.weight().T @ target.tensor("peanut_A.weight").T)
    kept = []
    for layer in range(depth):
        kept.append(found)
        found = act(F.linear(found, target.tensor(f"peanut_encoders.{layer}.weight")))
    for layer in range(depth):
        found = act(F.linear(found, target.tensor(f"peanut_decoders.{layer}.weight"))) + kept[depth - 1 - layer]
    return delta(target, found.T, target.tensor("peanut_B.weight"), torch.full((config.r,), config.scaling))


METHODS = (
    Method(
        kind="peanut",
        peft_type="PEANUT",
        config=PeanutConfig,
        served="folded",
        note="A LoRA of rank r, made from the base's weights.",
        source="arXiv 2410.01870",
        parts=frozenset({"peanut_A.weight", "peanut_B.weight", *_inner(_MAX_DEPTH)}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
