"""Tensor names of a PEFT file: which base module each belongs to, and which part of the adapter it is.

PEFT writes `base_model.model.<module>.lora_A.weight`; embeddings have `lora_embedding_A` without `.weight`; modules
saved whole have `<module>.weight`; targets named `embed_tokens` or `lm_head` bring a copy of the base as
`<module>.base_layer.weight`. Older releases and other trainers keep the adapter's name (`lora_A.default.weight`) or
wrap the model (`_orig_mod.`, `module.`), or train the model without its head, which shortens every name alike.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_match import dotted_suffixes
from adapters_store.safetensors_header import TensorEntry

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_FOREIGN = (
    "lora_magnitude_vector",
    "lora_E",
    "ranknum",
    "lora_diag",
    "lora_ga",
    "trainable_tokens_delta",
    "lora_router",
)
_PREFIXES = ("base_model.model.", "_orig_mod.", "module.", "base_model.")


@dataclass(frozen=True, slots=True)
class Key:
    """`part` is one of A, B, bias, embedding_A, embedding_B, base.weight, base.bias, whole.weight, whole.bias."""

    module: str
    part: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one base module, by part."""

    module: str
    parts: dict[str, TensorEntry]


def group(
    entries: Iterable[TensorEntry], known: Iterable[str], take_apart: Callable[[str], Key] | None = None
) -> tuple[dict[str, ModuleTensors], str]:
    """The tensors by full base module name, and what the adapter's names leave out in front (`""` or `"model."`).

    known: the base's module names; take_apart: `split`, or another method's `split_parts`. Raises AdapterInvalid:
    `no_modules_matched`, `base_mismatch` for modules that the base lacks, `bad_tensor_entry` for a name of no known
    form, `feature_unsupported` for a part that is not served.
    """
    keys = {entry.name: (take_apart or split)(entry.name) for entry in entries}
    adapters = {key.adapter for key in keys.values() if key.adapter is not None}
    if len(adapters) > 1:
        raise _entry_error(next(iter(keys)), f"is beside tensors of other adapters: {_listed(adapters)}")
    ours = frozenset(known)
    outer = _outer({key.module for key in keys.values()}, ours)
    grouped: dict[str, ModuleTensors] = {}
    strangers = []
    for entry in entries:
        key = keys[entry.name]
        module = outer + key.module
        if module not in ours:
            strangers.append(key.module)
            continue
        parts = grouped.setdefault(module, ModuleTensors(module, {})).parts
        if key.part in parts:
            raise _entry_error(entry.name, f"gives the same factor as `{shorten(parts[key.part].name)}`")
        parts[key.part] = entry
    if strangers:
        raise AdapterInvalid(
            f"The adapter changes modules that the base lacks: {_listed(strangers)}; the base has {_listed(ours)}. "
            "It was trained on another model.",
            code="base_mismatch",
            param="weights",
        )
    return grouped, outer


def split(name: str) -> Key:
    """Takes a tensor name apart; the module is without PEFT's prefixes."""
    if "lora_latent_mapping" in name:
        raise AdapterInvalid(
            f'Tensor `{shorten(name)}` is LoRA-XS\'s or LoRA-SB\'s: write `"peft_type": "LORA_XS"` (or "LORA_SB") in '
            "adapter_config.json.",
            code="feature_unsupported",
            param="weights",
        )
    pieces = strip(name).split(".")
    for index, piece in enumerate(pieces):
        rest = pieces[index + 1 :]
        module = ".".join(pieces[:index])
        if piece.startswith(_FOREIGN):
            raise AdapterInvalid(
                f"Tensor `{shorten(name)}` belongs to a method that is not served yet ({piece}).",
                code="feature_unsupported",
                param="weights",
            )
        if piece in _FACTORS:
            return _factor(name, module, piece.removeprefix("lora_"), rest)
        if piece == "modules_to_save" and rest and rest[-1] in ("weight", "bias"):
            return Key(module, f"whole.{rest[-1]}", ".".join(rest[:-1]) or None)
        if piece == "base_layer" and rest in (["weight"], ["bias"]):
            return Key(module, f"base.{rest[0]}")
    if pieces[-1] in ("weight", "bias") and len(pieces) > 1:
        return Key(".".join(pieces[:-1]), f"whole.{pieces[-1]}")
    raise _entry_error(name, "is none that PEFT writes for a LoRA")


def split_parts(name: str, parts: Collection[str], spellings: Mapping[str, str] | None = None) -> Key:
    """Takes the tensor name of a method apart whose tensors are called `<module>.<part>`, as in `hada_w1_a` or
    `oft_R.weight`; PEFT's adapter name may stand after a part's first word. spellings: what the end of a name means."""
    spelled = next((end for end in spellings or {} if name.endswith(end)), "")
    pieces = (strip(name).removesuffix(spelled) + (spellings or {}).get(spelled, "")).split(".")
    for index in range(1, len(pieces)):
        rest, module = pieces[index:], ".".join(pieces[:index])
        if ".".join(rest) in parts:
            return Key(module, ".".join(rest))
        if len(rest) > 1 and ".".join((rest[0], *rest[2:])) in parts:
            return Key(module, ".".join((rest[0], *rest[2:])), rest[1])
        if rest[0] == "modules_to_save" and rest[-1] in ("weight", "bias"):
            return Key(module, f"whole.{rest[-1]}", ".".join(rest[1:-1]) or None)
        if rest in (["base_layer", "weight"], ["base_layer", "bias"]):
            return Key(module, f"base.{rest[1]}")
    if pieces[-1] in ("weight", "bias") and len(pieces) > 1:
        return Key(".".join(pieces[:-1]), f"whole.{pieces[-1]}")
    raise _entry_error(name, "is none that PEFT writes for this method")


def _factor(name: str, module: str, factor: str, rest: list[str]) -> Key:
    embedding = factor.startswith("embedding")
    leaf = "weight" if embedding or not rest else rest[-1]
    adapter = rest if embedding else rest[:-1]
    part = "bias" if (factor, leaf) == ("B", "bias") else factor
    if (not embedding and not rest) or leaf != ("bias" if part == "bias" else "weight") or len(adapter) > 1:
        raise _entry_error(name, "is none that PEFT writes for a LoRA")
    return Key(module, part, adapter[0] if adapter else None)


def strip(name: str) -> str:
    """A tensor's name without the prefixes of PEFT and of wrapped models."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _outer(theirs: set[str], ours: frozenset[str]) -> str:
    """The one prefix that makes all their names ours; PEFT's own spelling wins if it fits anywhere."""
    if theirs & ours:
        return ""
    first = min(theirs, default="")
    prefixes = {name.removesuffix(first) for name in ours if first in dotted_suffixes(name)} if first else set()
    fitting = [prefix for prefix in prefixes if all(prefix + name in ours for name in theirs)]
    if len(fitting) == 1:
        return fitting[0]
    raise AdapterInvalid(
        f"No module of the adapter is in the base model. The adapter has {_listed(theirs) or 'no tensors'}; the base "
        f"has {_listed(ours)}. Train on this base, or save with PEFT's `save_pretrained`.",
        code="no_modules_matched",
        param="weights",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{shorten(name, 80)}`" for name in sorted(set(names))[:3])


def _entry_error(name: str, problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"Tensor `{shorten(name)}` {problem}.", code="bad_tensor_entry", param="weights")
