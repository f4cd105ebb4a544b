"""GLoRA (arXiv 2306.07967): a weight is scaled and shifted, and so is its bias, each by a matrix, vector or number."""

from typing import Literal

import torch

from adapters_store.formats.kinds.folding import dense, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shape, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form, LowRank, OutputScale

_SMALL = 1e-3  # a scale below it cannot be divided by without losing digits
Path = Literal["lora", "vector", "constant", "none"]


class GloraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. Without a bias of the base, C, D and E do nothing."""

    bias: str = "none"
    config_A_B: Path = "lora"  # noqa: N815  # PEFT's name
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    init_weights: bool = True


def _path(target: Target, letter: str) -> Path:
    config = target.file.config
    if letter in "AB":
        found: Path = config.config_A_B
    else:
        found = (config.config_C if letter == "C" else config.config_D_E) if target.spec.bias else "none"
    return found


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    found: dict[str, Shape] = {}
    for letter in "ABCDE":
        rows, columns = (target.inputs, 1) if letter == "C" else (target.outputs, target.inputs)
        match _path(target, letter):
            case "lora":
                target.bound_rank(target.rank)
                found |= {f"glora_{letter}.Xd": (rows, target.rank), f"glora_{letter}.Xu": (target.rank, columns)}
            case "vector":
                found[f"glora_{letter}.X"] = (rows,) if letter in "DE" else (rows, 1)
            case "constant":
                found[f"glora_{letter}.X"] = (1,)
            case "none":
                part = f"glora_{letter}.zeros"
                if part in target:
                    found[part] = (rows,) if letter in "DE" else (rows, columns)
    return found


def _value(target: Target, letter: str) -> torch.Tensor:
    """float32, of a shape that broadcasts: a matrix, a column, or a number."""
    match _path(target, letter):
        case "lora":
            return target.tensor(f"glora_{letter}.Xd") @ target.tensor(f"glora_{letter}.Xu")
        case "none":
            part = f"glora_{letter}.zeros"
            if part in target and bool(target.tensor(part).any()):
                target.refuse(f"holds numbers in `{part}`, which the config says is empty", "bad_config")
            return torch.zeros(1)
        case _:
            return target.tensor(f"glora_{letter}.X")


def _forms(target: Target) -> list[Form]:
    """`(W + W * A + B) x + b + b * D + E + W C`, `*` number by number."""
    a, b = _value(target, "A"), _value(target, "B")
    bias = target.bias()
    shift = torch.zeros(target.outputs) if bias is None else _shift(target, bias)
    if _path(target, "A") == "lora":
        return [*dense(target.weight() * a + b), OutputScale(bias=shift)]
    gain, rows = (1 + a).flatten().expand(target.outputs), b.flatten().expand(target.outputs)
    if bool((gain.abs() < _SMALL).any()):
        whole = target.weight() * a + b
        return [*dense(whole.expand(target.outputs, target.inputs)), OutputScale(bias=shift)]
    shift = shift if bias is None else shift - (gain - 1) * bias
    summed = LowRank(torch.ones(1, target.inputs), (rows / gain)[:, None].contiguous(), torch.ones(1))
    return [*([summed] if bool(rows.any()) else []), OutputScale(gain.contiguous(), shift)]


def _shift(target: Target, bias: torch.Tensor) -> torch.Tensor:
    shift = bias * _value(target, "D") + _value(target, "E")
    if _path(target, "C") != "none":
        shift = shift + (target.weight() @ _value(target, "C")).flatten()
    return shift


METHODS = (
    Method(
        kind="glora",
        peft_type="GLORA",
        config=GloraConfig,
        served="native",
        note="A scale of each output and a delta of rank one, or a dense delta where A and B are matrices; a bias.",
        source="arXiv 2306.07967",
        parts=frozenset(f"glora_{letter}.{part}" for letter in "ABCDE" for part in ("X", "Xd", "Xu", "zeros")),
        shapes=_shapes,
        forms=_forms,
        check=refuse_bias,
    ),
)
