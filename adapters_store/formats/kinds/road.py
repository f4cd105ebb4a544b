"""RoAd (arXiv 2409.00119): outputs are turned and scaled in pairs."""

from typing import ClassVar, Literal

import torch

from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form, OutputScale


class RoadConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    least_rank: ClassVar[int] = 0

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True


def _check(config: RoadConfig) -> None:
    if config.group_size < 2 or config.group_size % 2:
        bad("has a `group_size` that is not even and positive", "group_size")


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    config, outputs = target.file.config, target.outputs
    if outputs % config.group_size:
        target.refuse(f"has {outputs} outputs, no multiple of group_size {config.group_size}", "bad_config")
    count = {"road_1": outputs // 2, "road_2": outputs, "road_4": outputs * 2}[config.variant]
    return {"road_theta": (count,), "road_alpha": (count,)}


def _forms(target: Target) -> list[Form]:
    """`alpha (cos theta * y + sin theta * partner(y))`, minus for the first of a pair; y has the base's bias.

    One angle and factor for each pair, each output, or each of the four numbers of a pair's matrix.
    """
    config = target.file.config
    theta, alpha = target.tensor("road_theta"), target.tensor("road_alpha")
    half = config.group_size // 2
    if config.variant == "road_1":
        theta, alpha = (part.view(-1, 1, half).expand(-1, 2, half).flatten() for part in (theta, alpha))
    if config.variant == "road_4":
        (theta, across), (alpha, beside) = (part.view(-1, 2, config.group_size).unbind(1) for part in (theta, alpha))
    else:
        across, beside = theta, alpha
    pair = (beside * across.sin()).reshape(-1, 2, half) * torch.tensor([-1.0, 1.0])[:, None]
    return [OutputScale((alpha * theta.cos()).flatten(), None, pair.flatten(), half)]


METHODS = (
    Method(
        kind="road",
        peft_type="ROAD",
        config=RoadConfig,
        served="native",
        note="Outputs, the base's bias included, are turned and scaled in pairs.",
        source="arXiv 2409.00119",
        parts=frozenset({"road_theta", "road_alpha"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)
