"""Rows of the embedding that were trained for single tokens: PEFT's trainable tokens, alone or beside a LoRA."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from adapters_store.formats.kinds import lora_parts
from adapters_store.formats.kinds.sparse_rows import compressed
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form, Sparse

_ALONE, _BESIDE = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"
Rows = Mapping[str, Sequence[int]]  # tokens by module


class TrainableTokensConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    least_rank: ClassVar[int] = 0

    token_indices: list[int]
    init_weights: bool = True


def _wanted(file: AdapterFile) -> Rows:
    """Which tokens the config trains, by the modules of the base that hold them."""
    config = file.config
    if isinstance(config, TrainableTokensConfig):
        return dict.fromkeys(file.modules, config.token_indices)
    told = config.trainable_token_indices
    if isinstance(told, list):
        return {} if file.base.input_embedding is None else {file.base.input_embedding: told}
    found = {name: told[end] for end in told for name in file.base.modules if name.endswith(end)}
    if _is_tied(file, found) and file.base.head in found:
        del found[file.base.head]  # its rows are the embedding's
    return found


def _is_tied(file: AdapterFile, rows: Rows) -> bool:
    """Whether the head follows the embedding, as its weight does (PEFT: `set_additional_trainable_modules`)."""
    base = file.base
    tokens = rows.get(base.input_embedding or "")
    return base.tied and tokens is not None and rows.get(base.head or "", tokens) == tokens


def _shape(target: Target, tokens: Sequence[int]) -> tuple[int, int]:
    spec = target.spec
    if spec.kind == "conv1d" or spec.bias:
        target.refuse(f"is of kind {spec.kind}, and holds no rows of tokens", "feature_unsupported")
    count, width = _table(target)
    if not tokens or len(set(tokens)) < len(tokens) or min(tokens) < 0 or max(tokens) >= count:
        bad(f"must list each of its trained tokens once, from 0 to {count - 1}", "token_indices")
    return len(tokens), width


def _table(target: Target) -> tuple[int, int]:
    """Tokens, and the length of a token's row."""
    sizes = (target.inputs, target.outputs)
    return sizes if target.spec.kind == "embedding" else sizes[::-1]


def _replaced(target: Target, tokens: Sequence[int], rows: torch.Tensor) -> Sparse:
    """The difference of these rows to the base's. rows: float32 [tokens, width]."""
    count, width = _table(target)
    index = torch.tensor(tokens)
    weight = target.weight()
    own = weight.T[index] if target.spec.kind == "embedding" else weight[index]
    place = (index[:, None] * width + torch.arange(width)).flatten()
    return compressed(place, ((rows - own) * target.spec.scale).flatten(), count, width)


def _shapes_alone(target: Target) -> Shapes:
    return {_ALONE: _shape(target, target.file.config.token_indices)}


def _forms_alone(target: Target) -> list[Form]:
    file = target.file
    twin = file.base.input_embedding if target.name in _tied_head(file) else None
    if twin is not None and not torch.equal(target.raw(_ALONE), Target(file, twin).raw(_ALONE)):
        target.refuse("shares its weight with the embedding, and has other trained rows")
    return [_replaced(target, target.file.config.token_indices, target.tensor(_ALONE))]


def _tied_head(file: AdapterFile) -> Collection[str]:
    """PEFT trains a tied head with its embedding, and saves the rows of both."""
    base = file.base
    return (base.head,) if base.tied and base.head is not None and base.input_embedding in file.modules else ()


def _shapes_beside(target: Target) -> Shapes:
    wanted = _wanted(target.file)
    if missing := sorted(wanted.keys() - target.file.modules.keys()):
        Target(target.file, missing[0]).refuse("lacks the rows of its trained tokens")
    if target.name not in wanted:
        return lora_parts.shapes(target)
    if lora_parts.PARTS & target.entries.keys():
        target.refuse("has trained tokens and a LoRA", "feature_unsupported")
    return {_BESIDE: _shape(target, wanted[target.name])}


def _forms_beside(target: Target) -> list[Form]:
    if _BESIDE not in target:
        return [lora_parts.low_rank(target)]
    return [_replaced(target, _wanted(target.file)[target.name], target.tensor(_BESIDE))]


def _head(file: AdapterFile) -> Mapping[str, Iterable[Form]]:
    """A tied head's rows are those of the embedding; the file has them once."""
    rows, head, name = _wanted(file), file.base.head, file.base.input_embedding
    if head is None or name is None or name not in file.modules or head in file.modules or not _is_tied(file, rows):
        return {}
    target = Target(file, name)
    part = _ALONE if _ALONE in target else _BESIDE
    return {head: [_replaced(Target(file, head), rows[name], target.tensor(part))]} if part in target else {}


def _check(config: PeftConfig) -> None:
    lora_parts.check(config, ("trainable_token_indices",))


def _is_on(fields: Mapping[str, Any]) -> bool:
    return fields.get("trainable_token_indices") not in (None, [], {})


_NOTE = "the trained tokens' rows of the embedding, and of a head that shares its weight, as a sparse delta."

METHODS = (
    Method(
        kind="trainable_tokens",
        peft_type="TRAINABLE_TOKENS",
        config=TrainableTokensConfig,
        served="native",
        note=_NOTE.capitalize(),
        source="peft.tuners.trainable_tokens",
        parts=frozenset({_ALONE}),
        shapes=_shapes_alone,
        forms=_forms_alone,
        beside=_tied_head,
        also=_head,
    ),
    Method(
        kind="lora_tokens",
        peft_type="LORA",
        config=PeftConfig,
        served="native",
        note=f"A LoRA, and {_NOTE}",
        source="peft.tuners.trainable_tokens",
        parts=lora_parts.PARTS | {_BESIDE},
        shapes=_shapes_beside,
        forms=_forms_beside,
        beside=_wanted,
        also=_head,
        check=_check,
        when=_is_on,
    ),
)
