"""The door for files in PEFT's manner, whatever the method: two files in, forms out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters_store.formats import method_file, methods, peft, tuner_config
from adapters_store.formats.made import Seen, forms_of
from adapters_store.formats.method import Method
from adapters_store.formats.peft import Imported
from adapters_store.forms import AdapterWeights, BaseSpec
from adapters_store.info import Notice
from adapters_store.limits import Limits
from adapters_store.variants import NO_KNOBS, WHOLE, Variant, require


def inspect(config: bytes, weights: Path, base: BaseSpec, limits: Limits) -> Imported:
    """Checks an adapter's two files against the base, values included.

    Raises UnsupportedFormat or AdapterInvalid with the code of the first fault. Memory: a few MiB for a LoRA, else the
    forms of one module.
    """
    fields = tuner_config.read_fields(config, limits.config_bytes)
    method = methods.select(fields)
    if method is None:
        return peft.inspect(config, weights, base, limits)
    return _inspect(method, fields, weights, base, limits)


class Loader:
    """Loads the adapters of one base. Thread-safe."""

    def __init__(self, base: BaseSpec, limits: Limits) -> None:
        self._base = base
        self._limits = limits
        self._lora = peft.Loader(base, limits)

    def load(self, config: bytes, weights: Path, digest: str, variant: Variant = WHOLE) -> AdapterWeights:
        """The forms, in memory of their own, under `digest`. Raises AdapterInvalid, KnobRefused, OSError.

        variant: which of the adapters in the file.
        """
        fields = tuner_config.read_fields(config, self._limits.config_bytes)
        method = methods.select(fields)
        if method is None:
            require(NO_KNOBS, variant)
            return self._lora.load(config, weights, digest)
        with weights.open("rb") as stream:
            opened = method_file.open_file(method, fields, weights, stream, self._base, self._limits)
            require(method.knobs(opened.file), variant)
            opened.file = replace(opened.file, variant=variant, memo={})
            made = dict(forms_of(method, opened))
            return AdapterWeights(digest, made, method.context(opened.file), method.invocation(opened.file.config))


def _inspect(method: Method, fields: dict[str, Any], weights: Path, base: BaseSpec, limits: Limits) -> Imported:
    seen, matched = Seen(limits), 0
    with weights.open("rb") as stream:
        opened = method_file.open_file(method, fields, weights, stream, base, limits)
        peft.second_opinion(weights)
        numbers = [entry for entry in opened.entries if entry.dtype.is_floating_point]
        opened.notices += peft.check_values(stream, limits.cast, numbers, opened.copies, base)
        for name, forms in forms_of(method, opened):
            matched += 1
            for form in forms:
                seen.add(name, form)
        context = method.context(opened.file)
        if context is not None:
            seen.add("context", context)
    if not seen.acts:
        opened.notices.append(peft.NOOP)
    ranks = seen.ranks or [0]
    named = opened.file.config.base_model_name_or_path
    return Imported(
        kind=method.kind,
        forms=tuple(sorted(seen.names)),
        modules={"matched": matched, "total": len(base.modules)},
        rank={"min": min(ranks), "max": max(ranks)},
        parameters=sum(entry.count for entry in opened.entries),
        warnings=_told(opened.notices),
        base=peft.base_check(named, opened.copies, base),
        knobs=method.knobs(opened.file),
        virtual_tokens=0 if context is None else context.num_tokens,
        invocation=method.invocation(opened.file.config),
    )


def _told(notices: list[Notice]) -> tuple[dict[str, str], ...]:
    return tuple({"code": notice.code, "message": notice.message} for notice in notices)
