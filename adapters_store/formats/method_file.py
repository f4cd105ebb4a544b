"""Opens the file of a method: config and header against the base, shapes before values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats import peft_keys, peft_plan, tuner_config
from adapters_store.formats.method import AdapterFile, Method, Shapes
from adapters_store.formats.peft_keys import ModuleTensors
from adapters_store.formats.peft_match import Matcher
from adapters_store.formats.peft_plan import ReplacementPlan
from adapters_store.formats.tensors import read
from adapters_store.forms import BaseSpec, ModuleSpec
from adapters_store.info import Notice
from adapters_store.limits import Limits
from adapters_store.safetensors_header import TensorEntry, read_header

_AXES = range(5)  # of a method's tensors, from single numbers to POLY's [splits, skills, in, rank]


@dataclass(slots=True)
class Opened:
    """A file whose shapes fit. copies: the base's own weights inside it, to be compared with the base."""

    file: AdapterFile
    replaced: list[ReplacementPlan] = field(default_factory=list)
    copies: list[tuple[str, TensorEntry]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    @property
    def entries(self) -> list[TensorEntry]:
        """Every tensor that acts."""
        found = [entry for parts in self.file.modules.values() for entry in parts.values()]
        found += self.file.common.values()
        return found + [entry for item in self.replaced for entry in (item.weight, item.bias) if entry]


def open_file(
    method: Method, fields: dict[str, Any], weights: Path, stream: BufferedReader, base: BaseSpec, limits: Limits
) -> Opened:
    """fields: of adapter_config.json. stream: the weights, which must stay open as long as tensors are read.

    Raises AdapterInvalid with the codes of `peft_plan.make`.
    """
    config = tuner_config.validate(fields, method.config)
    if features := tuner_config.unserved(config):
        tuner_config.unsupported(features)
    method.check(config)
    base = _norms(base) if method.norms else base
    entries = read_header(weights, limits.header, method.dtypes, _AXES).values()
    common = {peft_keys.strip(entry.name): entry for entry in entries if _is_common(method, entry)}
    own = [entry for entry in entries if not _is_common(method, entry)]
    if len(common) + len(own) < len(entries):
        raise AdapterInvalid(
            f"The file gives one of {', '.join(f'`{shorten(name)}`' for name in sorted(common)[:3])} twice.",
            code="bad_tensor_entry",
            param="weights",
        )
    split = partial(peft_keys.split_parts, parts=method.parts, spellings=method.spellings)
    grouped, outer = peft_keys.group(own, base.modules, split) if own else ({}, "")
    matcher = Matcher(config, base, outer) if isinstance(config, tuner_config.TunerConfig) else None
    modules = {name: _own_parts(method, tensors) for name, tensors in grouped.items()}
    modules = {name: parts for name, parts in modules.items() if parts}
    if method.implied and matcher is not None:
        modules |= {name: {} for name in matcher.targeted() - modules.keys()}
    file = AdapterFile(config, base, limits, matcher, modules, common, partial(read, stream))
    opened = Opened(file)
    _place_others(opened, method, grouped)
    _check_targets(opened, method)
    _check_shapes("", common, method.common(file))
    for target in file.targets:
        _check_shapes(target.name, target.entries, method.shapes(target))
    return opened


def _norms(base: BaseSpec) -> BaseSpec:
    """The base as if its norms were its modules."""
    modules = {
        name: ModuleSpec("linear", size, size, bias=name in base.norm_biases) for name, size in base.norms.items()
    }
    return replace(base, modules=modules)


def _is_common(method: Method, entry: TensorEntry) -> bool:
    name = peft_keys.strip(entry.name)
    return name in method.common_parts or name.partition(".")[0] in method.common_parts


def _own_parts(method: Method, tensors: ModuleTensors) -> dict[str, TensorEntry]:
    return {part: entry for part, entry in tensors.parts.items() if part in method.parts}


def _place_others(opened: Opened, method: Method, grouped: Mapping[str, ModuleTensors]) -> None:
    """Heads saved whole, and copies of the base."""
    file = opened.file
    matcher = file.matcher
    if matcher is not None and (entries := matcher.saved_entries()):
        names = ", ".join(f"`{shorten(entry, 60)}`" for entry in entries)
        tuner_config.unsupported([f"modules_to_save {names} (only the output head)"])
    saved = file.base.head if matcher is not None and matcher.config.modules_to_save else None
    for name, tensors in grouped.items():
        parts = {part: entry for part, entry in tensors.parts.items() if part not in method.parts}
        spec = file.base.modules[name]
        if name == saved and "whole.weight" in parts:
            opened.replaced.append(peft_plan.replacement(name, parts, spec))
        for part in [part for part in parts if part.endswith(".weight") or part == "base.bias"]:
            copy = parts.pop(part)
            is_weight = part.endswith(".weight")
            peft_plan.check_shape(copy, peft_plan.weight_shape(spec) if is_weight else (spec.out_features,), name)
            opened.copies.append((name, copy))
        if parts:
            raise peft_plan.unused(next(iter(parts.values())), "would be left over: the config does not mention it")


def _check_targets(opened: Opened, method: Method) -> None:
    file, matcher = opened.file, opened.file.matcher
    if matcher is None:
        return
    targeted = matcher.targeted()
    if not targeted and not opened.replaced:
        raise peft_plan.no_targets(matcher.config, file.base)
    for name, parts in file.modules.items():
        if name not in targeted and name not in method.beside(file):
            raise peft_plan.unused(next(iter(parts.values())), "targets a module that the config does not select")
    if not file.modules and not opened.replaced and not file.common:
        raise AdapterInvalid(
            "The file holds no adapter weights, only copies of the base.", code="no_modules_matched", param="weights"
        )
    opened.notices.extend(peft_plan.gaps(matcher, targeted, set(file.modules), file.base))


def _check_shapes(module: str, entries: Mapping[str, TensorEntry], wanted: Shapes) -> None:
    where = f"`{shorten(module)}`" if module else "The adapter"
    if missing := sorted(wanted.keys() - entries.keys()):
        raise AdapterInvalid(
            f"{where} lacks {', '.join(f'`{part}`' for part in missing[:3])}.", code="shape_mismatch", param="weights"
        )
    if extra := sorted(entries.keys() - wanted.keys()):
        raise peft_plan.unused(entries[extra[0]], "would be left over: the config does not mention it")
    for part, shape in wanted.items():
        if entries[part].shape != shape:
            raise AdapterInvalid(
                f"`{shorten(entries[part].name)}` is {list(entries[part].shape)}; config and base need {list(shape)}.",
                code="shape_mismatch",
                param="weights",
            )
