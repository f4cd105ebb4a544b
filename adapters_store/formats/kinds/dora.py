"""DoRA (arXiv 2402.09353): the length of each row of the adapted weight is trained beside its direction."""

import torch

from adapters_store.formats.kinds import lora_parts
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import unsupported
from adapters_store.forms import Form, OutputScale

_MAGNITUDE = "lora_magnitude_vector"
_ROWS = 1024  # of the adapted weight at a time, so that it never exists whole beside the base's


def _check(config: PeftConfig) -> None:
    lora_parts.check(config, ("use_dora",))
    if config.lora_bias:
        unsupported(["lora_bias of a DoRA"])


def _shapes(target: Target) -> Shapes:
    return {**lora_parts.shapes(target), _MAGNITUDE: (target.outputs,)}


def _forms(target: Target) -> list[Form]:
    """`m / |W + s B A| (W x + s B A x) + b`, row by row: the base's bias is not scaled.

    The norms do not know of the factor by which an embedding multiplies its rows, as in `peft.tuners.lora.dora`.
    """
    low, weight = lora_parts.low_rank(target), target.weight()
    a, b, factor = low.a.float(), low.b.float(), lora_parts.scale(target)
    rows = [
        (part + factor * (b_part @ a)).norm(dim=1)
        for part, b_part in zip(torch.split(weight, _ROWS), torch.split(b, _ROWS), strict=True)
    ]
    ratio = target.tensor(_MAGNITUDE) / torch.cat(rows)
    bias = target.bias()
    return [low, OutputScale(ratio, None if bias is None else (1 - ratio) * bias)]


METHODS = (
    Method(
        kind="dora",
        peft_type="LORA",
        config=PeftConfig,
        served="native",
        note="A low-rank delta and a scale of each output, from the norms of the base's weight with the delta.",
        source="arXiv 2402.09353",
        parts=lora_parts.PARTS | {_MAGNITUDE},
        shapes=_shapes,
        forms=_forms,
        check=_check,
        when=lambda fields: bool(fields.get("use_dora")),
    ),
)
