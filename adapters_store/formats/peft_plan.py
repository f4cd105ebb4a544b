"""Fits config and tensors of a PEFT file to the base model: which forms arise, before any weight is read.

Sizes come from the file's header and are checked against the base; no number of the config allocates anything.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.formats.peft_keys import ModuleTensors, group
from adapters_store.formats.peft_match import Matcher
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import BaseSpec, ModuleSpec
from adapters_store.info import Notice
from adapters_store.limits import Limits
from adapters_store.safetensors_header import TensorEntry


@dataclass(frozen=True, slots=True)
class LowRankPlan:
    """One low-rank delta: a [r, in] and b [out, r] in the file, `scale` for every rank, bias [out] or None."""

    module: str
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class ReplacementPlan:
    """A head saved whole."""

    module: str
    weight: TensorEntry
    bias: TensorEntry | None


@dataclass(slots=True)
class Plan:
    """Every tensor of the file, each in one place. copies: the base's own weights, to be compared with the base;
    named: the base that the config names."""

    named: str | None = None
    lowrank: list[LowRankPlan] = field(default_factory=list)
    replaced: list[ReplacementPlan] = field(default_factory=list)
    copies: list[tuple[str, TensorEntry]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    @property
    def modules(self) -> set[str]:
        return {plan.module for plan in self.lowrank} | {plan.module for plan in self.replaced}


def make(config: PeftConfig, entries: Iterable[TensorEntry], base: BaseSpec, limits: Limits) -> Plan:
    """The plan, or AdapterInvalid: `no_modules_matched`, `base_mismatch`, `shape_mismatch`, `rank_limit`,
    `bad_tensor_entry`, `bad_config` or `feature_unsupported`."""
    grouped, outer = group(entries, base.modules)
    matcher = Matcher(config, base, outer)
    _check_features(config, matcher, base)
    targeted = matcher.targeted()
    saved = {base.head} if config.modules_to_save else set()
    if not targeted and not saved:
        raise no_targets(config, base)
    plan = Plan(named=config.base_model_name_or_path)
    for name, tensors in sorted(grouped.items()):
        _place(plan, tensors, base.modules[name], matcher, config, name in targeted, name in saved)
    if not plan.modules:
        raise AdapterInvalid(
            "The file holds no adapter weights, only copies of the base.", code="no_modules_matched", param="weights"
        )
    _check_rank(plan, limits)
    plan.notices += gaps(matcher, targeted | {name for name in saved if name}, plan.modules, base)
    return plan


def _place(
    plan: Plan,
    tensors: ModuleTensors,
    spec: ModuleSpec,
    matcher: Matcher,
    config: PeftConfig,
    targeted: bool,
    saved: bool,
) -> None:
    parts = dict(tensors.parts)
    if parts.keys() & {"A", "B", "bias", "embedding_A", "embedding_B"}:
        if not targeted:
            raise unused(next(iter(parts.values())), "targets a module that the config does not select")
        plan.lowrank.append(_lowrank(tensors.module, parts, spec, matcher, config))
    if saved and "whole.weight" in parts:
        plan.replaced.append(replacement(tensors.module, parts, spec))
    for part in [part for part in parts if part.endswith(".weight") or part == "base.bias"]:
        copy = parts.pop(part)
        check_shape(copy, weight_shape(spec) if part.endswith(".weight") else (spec.out_features,), tensors.module)
        plan.copies.append((tensors.module, copy))
    if parts:
        raise unused(next(iter(parts.values())), "would be left over: the config does not mention it")


def _lowrank(
    module: str, parts: dict[str, TensorEntry], spec: ModuleSpec, matcher: Matcher, config: PeftConfig
) -> LowRankPlan:
    prefix = "embedding_" if spec.kind == "embedding" else ""
    a, b = parts.pop(f"{prefix}A", None), parts.pop(f"{prefix}B", None)
    bias = parts.pop("bias", None)
    if a is None or b is None:
        lonely = a or b or bias or next(iter(parts.values()))
        raise AdapterInvalid(
            f"`{module}` needs both lora_{prefix}A and lora_{prefix}B; the file has only `{shorten(lonely.name)}`.",
            code="shape_mismatch",
            param="weights",
        )
    rank = matcher.rank(module)
    for entry in (a, b):
        if len(entry.shape) != 2:
            raise _entry_error(entry, f"has {len(entry.shape)} dimension; two are needed")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterInvalid(
            f"`{module}` has rank {rank} in the config, but `{shorten(a.name)}` is {list(a.shape)} and "
            f"`{shorten(b.name)}` is {list(b.shape)}.",
            code="shape_mismatch",
            param="weights",
        )
    check_shape(a, (rank, spec.in_features), module)
    check_shape(b, (spec.out_features, rank), module)
    if bias is not None:
        if not config.lora_bias:
            raise unused(bias, "is beside `lora_bias: false`")
        check_shape(bias, (spec.out_features,), module)
    elif config.lora_bias and not prefix:
        raise AdapterInvalid(f"`{module}` lacks lora_B.bias.", code="shape_mismatch", param="weights")
    alpha = matcher.alpha(module, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank) * spec.scale
    if abs(scale) > 1e30:  # beyond it even the smallest normal factors overflow float32
        raise AdapterInvalid(f"`{module}` has the scale {scale:.3g}.", code="bad_config", param="lora_alpha")
    return LowRankPlan(module, a, b, bias, scale)


def replacement(module: str, parts: dict[str, TensorEntry], spec: ModuleSpec) -> ReplacementPlan:
    weight, bias = parts.pop("whole.weight"), parts.pop("whole.bias", None)
    check_shape(weight, weight_shape(spec), module)
    if bias is not None:
        check_shape(bias, (spec.out_features,), module)
    elif spec.bias:
        raise AdapterInvalid(f"`{module}` is saved whole but without its bias.", code="shape_mismatch", param="weights")
    return ReplacementPlan(module, weight, bias)


def weight_shape(spec: ModuleSpec) -> tuple[int, int]:
    """The base's own layout: embeddings and Conv1D hold [in, out], linears [out, in]."""
    shape = (spec.out_features, spec.in_features)
    return shape if spec.kind == "linear" else shape[::-1]


def _check_features(config: PeftConfig, matcher: Matcher, base: BaseSpec) -> None:
    features = [f"modules_to_save `{shorten(entry, 60)}` (only the output head)" for entry in matcher.saved_entries()]
    ends = {name.rpartition(".")[2] for name in matcher.targeted()} | set(config.modules_to_save or [])
    embeddings = {name for name, spec in base.modules.items() if spec.kind == "embedding"} | {base.head or ""}
    if config.ensure_weight_tying and base.tied and ends & {name.rpartition(".")[2] for name in embeddings}:
        features.append("ensure_weight_tying on a tied embedding or head")
    if features:
        raise AdapterInvalid(
            f"The adapter needs what this server does not serve: {'; '.join(features)}.",
            code="feature_unsupported",
            param="config",
        )
    if config.lora_bias and any(base.modules[name].kind == "embedding" for name in matcher.targeted()):
        raise AdapterInvalid("`lora_bias` does not go with an embedding target.", code="bad_config", param="lora_bias")


def _check_rank(plan: Plan, limits: Limits) -> None:
    worst = max(plan.lowrank, key=lambda item: item.rank, default=None)
    if worst is not None and worst.rank > limits.max_rank:
        cost = sum(entry.end - entry.start for item in plan.lowrank for entry in (item.a, item.b))
        raise AdapterInvalid(
            f"`{worst.module}` has rank {worst.rank}; the limit is {limits.max_rank}. Start the server with "
            f"`--max-rank {worst.rank}` to allow it: this adapter would take {cost} bytes of adapter memory.",
            code="rank_limit",
            param="weights",
        )


def gaps(matcher: Matcher, wanted: set[str], found: set[str], base: BaseSpec) -> list[Notice]:
    """What of the config came to nothing. wanted: modules that it selects or saves; found: those that have weights."""
    notices = []
    if unused := matcher.unused_targets():
        shown = ", ".join(shorten(name, 60) for name in unused[:3])
        notices.append(Notice("unmatched_targets", f"target_modules entries that select nothing here: {shown}."))
    if missing := sorted(wanted - found):
        text = f"{len(missing)} selected modules have no weights: {missing[0]}, ..."
        notices.append(Notice("modules_without_weights", text))
    named = matcher.config.base_model_name_or_path
    if named and named != base.id:
        text = f"Trained on `{shorten(named)}`, served on `{base.id}`; all shapes agree."
        notices.append(Notice("other_base_name", text))
    return notices


def check_shape(entry: TensorEntry, expected: tuple[int, ...], module: str) -> None:
    if entry.shape != expected:
        raise AdapterInvalid(
            f"`{shorten(entry.name)}` is {list(entry.shape)}; `{module}` of the base needs {list(expected)}. "
            "The adapter was trained on another model.",
            code="base_mismatch",
            param="weights",
        )


def no_targets(config: TunerConfig, base: BaseSpec) -> AdapterInvalid:
    targets = config.target_modules or []
    theirs = [targets] if isinstance(targets, str) else sorted(targets)[:3]
    return AdapterInvalid(
        f"`target_modules` {', '.join(f'`{shorten(name, 60)}`' for name in theirs)} select no module of the base, "
        f"which has {', '.join(f'`{name}`' for name in sorted(base.modules)[:3])}, ...",
        code="no_modules_matched",
        param="config",
    )


def unused(entry: TensorEntry, problem: str) -> AdapterInvalid:
    return _entry_error(entry, f"{problem}; nothing is dropped in silence")


def _entry_error(entry: TensorEntry, problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"Tensor `{shorten(entry.name)}` {problem}.", code="bad_tensor_entry", param="weights")
