"""`compress`: a smaller version of an adapter, measured against the original and refused where it is too lossy."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adapters_store.compression.recipe import Bounds, Compressed, Recipe, already_compressed, compress
from adapters_store.errors import AdapterConflict, AdapterInvalid
from adapters_store.forms import AdapterWeights
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.registry import AdapterRegistry
from server.divergence import PROMPTS, Divergence, Engine, measure
from server.trials import Trials


class Compressor:
    """Reads from the registry, measures through the engine, writes a new version. Nothing is written on a refusal."""

    def __init__(self, registry: AdapterRegistry, engine: Engine, trials: Trials) -> None:
        self._registry = registry
        self._engine = engine
        self._trials = trials

    async def compress(
        self,
        source: AdapterRef,
        recipe: Recipe,
        bounds: Bounds,
        *,
        target: str | None = None,
        replace: bool = False,
        probe: Sequence[str] | None = None,
    ) -> tuple[AdapterInfo, bool, dict[str, float]]:
        """The new version, whether it is new, and the relative Frobenius error of each module.

        target: its name, by default the source's own, whose current version the source must be; replace: the target
        may hold other content. probe: the prompts of the measurement, by default a fixed set.
        Raises AdapterInvalid `too_lossy`, `already_compressed` or `nothing_to_compress`, AdapterConflict, and what
        the registry and the engine raise.
        """
        name, tenant = target or source.name, source.tenant
        own = name == source.name and not replace
        if own and self._registry.resolve(name, tenant).digest != source.digest:
            raise AdapterConflict(
                f"`{name}` has another current version than {source.version}. Give a `target`, or `replace`.",
                param="target",
            )
        if self._registry.info(f"sha256:{source.digest}", tenant).provenance.get("type") == "compress":
            raise already_compressed()
        weights = await asyncio.to_thread(self._registry.load, source.digest)
        made = await asyncio.to_thread(compress, weights, recipe)
        _check("max_error", "relative error", made.relative_error, bounds.max_error)
        prompts = tuple(probe or PROMPTS)
        with self._trials.on_trial(weights) as original, self._trials.on_trial(_weights(made)) as changed:
            divergence = await measure(self._engine, prompts, original, changed, tenant)
        _check("max_divergence", "mean KL divergence", divergence.mean_kl, bounds.max_divergence)
        info, created = await asyncio.to_thread(
            self._registry.add_forms,
            name,
            made.modules,
            "compress",
            self._told(source, recipe, made, divergence, prompts),
            tenant=tenant,
            if_match=source.digest if own else None,
            replace=replace,
        )
        return info, created, {module: _digits(error) for module, error in made.errors.items()}

    def _told(
        self, source: AdapterRef, recipe: Recipe, made: Compressed, divergence: Divergence, prompts: Sequence[str]
    ) -> dict[str, Any]:
        """Fields of the manifest. Numbers in six digits, so that the last bits of a sum do not make another adapter."""
        origin = self._registry.info(f"sha256:{source.digest}", source.tenant)
        worst = max(made.errors, key=lambda module: made.errors[module])
        text = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        return {
            "kind": origin.kind,
            "warnings": [asdict(notice) for notice in origin.warnings],
            "provenance": {
                "type": "compress",
                "source": source.digest,
                "method": recipe.method,
                "parameters": recipe.parameters,
            },
            "compression": {
                "dtype": recipe.dtype,
                "relative_error": _digits(made.relative_error),
                "worst_module": {"name": worst, "relative_error": _digits(made.errors[worst])},
                "divergence": {key: _digits(value) for key, value in asdict(divergence).items()} | {"probe": text},
            },
            "module_errors": {module: _digits(error) for module, error in made.errors.items()},
        }


def _weights(made: Compressed) -> AdapterWeights:
    return AdapterWeights("", made.modules)


def _check(field: str, what: str, found: float, bound: float | None) -> None:
    if bound is not None and not found <= bound:
        raise AdapterInvalid(
            f"The compressed adapter's {what} is {found:.3g}; `{field}` allows {bound:.3g}. Nothing was stored; "
            "keep more ranks or energy, or raise the bound.",
            code="too_lossy",
            param=field,
        )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
