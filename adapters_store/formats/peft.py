"""PEFT's LoRA folder, imported: `adapter_config.json` and `adapter_model.safetensors` to forms.

Scale: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), with rank and alpha per module from the patterns,
as `peft.tuners.lora.layer` does; it is folded into `d`, and into the bias of B.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from adapters_store import canonical
from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats import peft_config, peft_plan
from adapters_store.formats.peft_plan import LowRankPlan, Plan, ReplacementPlan
from adapters_store.formats.tensors import blocks, read, scan
from adapters_store.forms import AdapterWeights, BaseSpec, Form, LowRank, ReplacedWeight
from adapters_store.info import BaseCheck, Notice
from adapters_store.limits import Limits
from adapters_store.records import WHERE_ANY
from adapters_store.safetensors_header import TensorEntry, raw_header, read_header
from adapters_store.variants import Knobs

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KIND = "lora"
PLANS = 64  # kept for loads to come; some 100 KB each
# A square layer that keeps the variance of its input has Frobenius norm sqrt(width). An update whose bound
# |scale| |B| |A| / sqrt(width) exceeds this lies far outside what training yields (usual values: 0.01 to 5).
EXTREME = 100.0
NOOP = Notice("adapter_is_noop", "Every delta is zero: the adapter changes nothing.")
_COPY_TOLERANCE = 1e-2  # relative; bfloat16 keeps 8 bits


@dataclass(frozen=True, slots=True)
class Imported:
    """What the file is. Equal files on an equal base give equal manifest fields; base: how it fits ours.

    knobs, virtual_tokens, invocation: as in `adapters_store.info.AdapterInfo`; in the manifest only where there are
    any, so that those of the kinds without stay as they were.
    """

    kind: str
    forms: tuple[str, ...]
    modules: dict[str, int]
    rank: dict[str, int]
    parameters: int
    warnings: tuple[dict[str, str], ...]
    base: BaseCheck
    knobs: Knobs = field(default_factory=dict)
    virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()

    def manifest_fields(self) -> dict[str, Any]:
        told = {key: value for key, value in asdict(self).items() if key != "base"}
        return {key: value for key, value in told.items() if value or key not in WHERE_ANY}


def inspect(config: bytes, weights: Path, base: BaseSpec, limits: Limits) -> Imported:
    """Checks a folder's two files against the base, values included; memory stays at a few MiB.

    Raises UnsupportedFormat or AdapterInvalid with the code of the first fault.
    """
    plan = _plan(config, weights, base, limits)
    second_opinion(weights)
    with weights.open("rb") as file:
        plan.notices.extend(_Values(file, limits.cast).check(plan, base))
    ranks = [item.rank for item in plan.lowrank] or [0]
    entries = [entry for item in plan.lowrank for entry in (item.a, item.b, item.bias) if entry]
    entries += [entry for item in plan.replaced for entry in (item.weight, item.bias) if entry]
    forms = [name for name, found in (("low_rank", plan.lowrank), ("replaced_weight", plan.replaced)) if found]
    return Imported(
        kind=KIND,
        forms=tuple(forms),
        modules={"matched": len(plan.modules), "total": len(base.modules)},
        rank={"min": min(ranks), "max": max(ranks)},
        parameters=sum(entry.count for entry in entries),
        warnings=tuple(asdict(notice) for notice in plan.notices),
        base=base_check(plan.named, plan.copies, base),
    )


class Loader:
    """Loads the adapters of one base. Thread-safe.

    The adapters of one recipe have the same config and the same header and differ in values only, so the plans made
    last are kept: of the 4.5 ms that a small adapter took to load, 2.8 went into its plan (2-core VM, 2026-11-26).
    """

    def __init__(self, base: BaseSpec, limits: Limits) -> None:
        self._base = base
        self._limits = limits
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, config: bytes, weights: Path, digest: str) -> AdapterWeights:
        """The forms, in memory of their own; factors in the file's dtype (the wider of two where A and B differ)."""
        plan = self._plan(config, weights)
        modules: dict[str, list[Form]] = defaultdict(list)
        with weights.open("rb") as file:
            for replaced in plan.replaced:
                modules[replaced.module].append(_replaced_weight(file, replaced))
            for lowrank in plan.lowrank:
                modules[lowrank.module].append(_low_rank(file, lowrank))
        return AdapterWeights(digest, {name: tuple(forms) for name, forms in modules.items()})

    def _plan(self, config: bytes, weights: Path) -> Plan:
        header = raw_header(weights, self._limits.header)
        sizes = b"%d %d " % (weights.stat().st_size, len(header))
        key = canonical.digest(sizes + header + config)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = _plan(config, weights, self._base, self._limits)
        with self._lock:
            self._plans[key] = plan
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        return plan


def _plan(config: bytes, weights: Path, base: BaseSpec, limits: Limits) -> Plan:
    entries = read_header(weights, limits.header)
    return peft_plan.make(peft_config.parse(config, limits.config_bytes), entries.values(), base, limits)


def base_check(named: str | None, copies: Sequence[tuple[str, TensorEntry]], base: BaseSpec) -> BaseCheck:
    """After all copies of the base that the file has were compared."""
    compared = base.weight is not None and any(len(entry.shape) == 2 for _, entry in copies)
    by_name: Literal["name", "shapes"] = "name" if named == base.id else "shapes"
    return BaseCheck("weights" if compared else by_name, shorten(named) if named else None)


def check_values(
    file: BufferedReader,
    cast: torch.dtype | None,
    entries: Iterable[TensorEntry],
    copies: Iterable[tuple[str, TensorEntry]],
    base: BaseSpec,
) -> list[Notice]:
    """One pass over the values of any method. Raises AdapterInvalid `nonfinite_weights` or `base_mismatch`."""
    values = _Values(file, cast)
    for entry in entries:
        values.norm(entry)
    return values.compared(copies, base)


def second_opinion(weights: Path) -> None:
    """The library opens what our own reader has passed; two parsers must agree before a file is kept."""
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} is damaged: {shorten(str(error))}.", code="corrupt_safetensors", param="weights"
        ) from None


def _low_rank(file: BufferedReader, plan: LowRankPlan) -> LowRank:
    a, b = read(file, plan.a), read(file, plan.b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    bias = None if plan.bias is None else read(file, plan.bias).float() * plan.scale
    return LowRank(a.to(dtype), b.to(dtype), torch.full((plan.rank,), plan.scale, dtype=torch.float32), bias)


def _replaced_weight(file: BufferedReader, plan: ReplacementPlan) -> ReplacedWeight:
    return ReplacedWeight(read(file, plan.weight), None if plan.bias is None else read(file, plan.bias).float())


@dataclass(slots=True)
class _Values:
    """One pass over all values: refuses non-finite ones, notes what looks wrong."""

    file: BufferedReader
    cast: torch.dtype | None
    extreme: list[str] = field(default_factory=list)

    def check(self, plan: Plan, base: BaseSpec) -> list[Notice]:
        moves = bool(plan.replaced)
        for item in plan.lowrank:
            product = abs(item.scale) * self.norm(item.a) * self.norm(item.b)
            bias = abs(item.scale) * self.norm(item.bias) if item.bias else 0.0
            moves = moves or product > 0 or bias > 0
            if product > EXTREME * max(item.a.shape[1], item.b.shape[0]) ** 0.5:
                self.extreme.append(item.module)
        for replaced in plan.replaced:
            self.norm(replaced.weight)
            if replaced.bias:
                self.norm(replaced.bias)
        notices = self.compared(plan.copies, base)
        if not moves:
            notices.append(NOOP)
        if self.extreme:
            text = f"{len(self.extreme)} modules have a delta over {EXTREME:g} times a usual layer: {self.extreme[0]}."
            notices.append(Notice("extreme_delta", text))
        return notices

    def compared(self, copies: Iterable[tuple[str, TensorEntry]], base: BaseSpec) -> list[Notice]:
        """Raises AdapterInvalid for a copy that is not the base's own."""
        return [notice for module, entry in copies if (notice := self._compare(module, entry, base))]

    def norm(self, entry: TensorEntry) -> float:
        """Frobenius. Raises AdapterInvalid for values that are not finite."""
        found = scan(self.file, entry, self.cast)
        if found.nonfinite:
            raise _values_error(entry, f"{found.nonfinite} of {entry.count} values that are NaN or infinite")
        if found.overflow:
            name = str(self.cast).removeprefix("torch.")
            raise _values_error(entry, f"{found.overflow} of {entry.count} values too large for {name}, as served")
        return found.norm

    def _compare(self, module: str, entry: TensorEntry, base: BaseSpec) -> Notice | None:
        """A copy of the base inside the file replaces the base in PEFT, so it must be the base's own."""
        if base.weight is None:
            if ".base_layer." in entry.name:
                return Notice("base_copy_ignored", f"The file's copy of `{module}` is ignored: the base's own is used.")
            raise AdapterInvalid(
                f"The file holds `{shorten(entry.name)}` whole, though `modules_to_save` does not name it.",
                code="feature_unsupported",
                param="weights",
            )
        if len(entry.shape) == 1 or _same(self.file, entry, base.weight(module)):
            return None
        raise AdapterInvalid(
            f"`{shorten(entry.name)}` differs from the base's own weights: the adapter belongs to another base, "
            "or the module was trained and should be in `modules_to_save`.",
            code="base_mismatch",
            param="weights",
        )


def _same(file: BufferedReader, entry: TensorEntry, ours: torch.Tensor) -> bool:
    start, flat = 0, ours.reshape(-1)
    for block in blocks(file, entry):
        expected = flat[start : start + len(block)].float()
        if not torch.allclose(block.float(), expected, rtol=_COPY_TOLERANCE, atol=1e-4):
            return False
        start += len(block)
    return True


def _values_error(entry: TensorEntry, problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"Tensor `{shorten(entry.name)}` has {problem}.", code="nonfinite_weights", param="weights")
