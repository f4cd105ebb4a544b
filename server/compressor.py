"""`compress`: smaller versions of adapters, measured against the originals and refused where they are too lossy."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adapters_store.compression.jointly import JointRecipe, Member, compress_jointly
from adapters_store.compression.recipe import Bounds, Compressed, Recipe, already_compressed, compress
from adapters_store.errors import AdapterConflict, AdapterInvalid
from adapters_store.forms import AdapterWeights, MadeForms
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.lookup import public
from adapters_store.names import PUBLIC
from adapters_store.registry import AdapterRegistry
from server.divergence import PROMPTS, Divergence, Engine, measure
from server.errors import InvalidRequest, ModelOutputInvalid, Overloaded
from server.trials import Trials

Told = tuple[AdapterInfo, bool, dict[str, float]]


class Compressor:
    """Reads from the registry, measures through the engine, writes a new version. Nothing is written on a refusal."""

    def __init__(self, registry: AdapterRegistry, engine: Engine, trials: Trials) -> None:
        self._registry = registry
        self._engine = engine
        self._trials = trials
        self._joining = False

    async def compress(
        self,
        source: AdapterRef,
        recipe: Recipe,
        bounds: Bounds,
        *,
        target: str | None = None,
        replace: bool = False,
        probe: Sequence[str] | None = None,
        tenant: str = PUBLIC,
    ) -> Told:
        """The new version, whether it is new, and the relative Frobenius error of each module.

        target: its name, by default the source's own, whose current version the source must be; replace: the target
        may hold other content. probe: the prompts of the measurement, by default a fixed set. tenant: whose the target
        is; a public source leaves the public name as it is and gets one of the tenant's own.
        Raises AdapterInvalid `too_lossy`, `already_compressed` or `nothing_to_compress`, AdapterConflict, and what
        the registry and the engine raise.
        """
        name = target or source.name
        own = (tenant, name) == (source.tenant, source.name) and not replace
        if own:
            self._check_current(source, "Give a `target`, or `replace`.", "target")
        self._check_original(source)
        weights = await asyncio.to_thread(self._registry.load, source.digest)
        made = await asyncio.to_thread(compress, weights, recipe, self._registry.base.embeddings)
        match = source.digest if own else None
        await asyncio.to_thread(self._registry.require_free, name, made.modules, tenant, match, replace)
        prompts = tuple(probe or PROMPTS)
        divergence = await self._measured(weights, made, bounds, prompts, tenant)
        told = self._told(source, made, divergence, prompts)
        told["provenance"] |= {"method": recipe.method, "parameters": recipe.parameters}
        told["compression"]["dtype"] = recipe.dtype
        info, created = await asyncio.to_thread(
            self._registry.add_forms,
            name,
            made.modules,
            "compress",
            told,
            tenant=tenant,
            if_match=match,
            replace=replace,
        )
        return info, created, told["module_errors"]

    async def compress_jointly(
        self,
        sources: Sequence[AdapterRef],
        recipe: JointRecipe,
        bounds: Bounds,
        *,
        probe: Sequence[str] | None = None,
        tenant: str = PUBLIC,
    ) -> list[Told]:
        """As `compress`, for a collection of one tenant, in the order of `sources`: current versions of their names.

        Each gets a next version, if all keep the bounds; a name that has changed meanwhile is refused (If-Match).
        Raises besides PublicAdapter for what is not the tenant's own, Overloaded while another collection is at work,
        InvalidRequest `duplicate_adapter`, and AdapterInvalid `rank_limit`, `too_few_adapters` or `modules_differ`.
        """
        _check_collection(sources, recipe, self._registry.limits.max_rank)
        for source in sources:
            if source.tenant != tenant:
                raise public(source.name)
            self._check_current(source, "Name it without a version.", "adapters")
            self._check_original(source)
        if self._joining:  # it takes minutes of a core and all factors in float64
            raise Overloaded("Another collection is being compressed. Try again when it is done.")
        self._joining = True
        try:
            return await self._jointly(sources, recipe, bounds, probe)
        finally:
            self._joining = False

    async def _jointly(
        self, sources: Sequence[AdapterRef], recipe: JointRecipe, bounds: Bounds, probe: Sequence[str] | None
    ) -> list[Told]:
        weights = [await asyncio.to_thread(self._registry.load, source.digest) for source in sources]
        members = await asyncio.to_thread(compress_jointly, weights, recipe)
        prompts, made = tuple(probe or PROMPTS), []
        for source, own, member in zip(sources, weights, members, strict=True):
            try:
                divergence = await self._measured(own, member.made, bounds, prompts, source.tenant)
            except AdapterInvalid as error:
                raise AdapterInvalid(f"`{source.name}`: {error.message}", code=error.code, param=error.param) from None
            told = self._told(source, member.made, divergence, prompts) | _collection(sources)
            told["provenance"] |= _joint_provenance(sources, recipe, member)
            told["compression"]["dtype"] = recipe.method
            made.append(MadeForms(source.name, member.made.modules, told, source.digest))
        stored = await asyncio.to_thread(self._registry.add_collection, made, "compress", sources[0].tenant)
        return [(*each, forms.told["module_errors"]) for each, forms in zip(stored, made, strict=True)]

    def _check_current(self, source: AdapterRef, hint: str, param: str) -> None:
        if self._registry.resolve(source.name, source.tenant).digest != source.digest:
            text = f"`{source.name}` has another current version than {source.version}. {hint}"
            raise AdapterConflict(text, param=param)

    def _check_original(self, source: AdapterRef) -> None:
        if self._registry.info(f"sha256:{source.digest}", source.tenant).provenance.get("type") == "compress":
            raise already_compressed()
        if source.knobs or source.virtual_tokens or source.invocation:
            text = "What a request chooses of this adapter, or where it acts, would be lost: it cannot be compressed."
            raise AdapterInvalid(text, code="feature_unsupported", param="adapter")

    async def _measured(
        self, weights: AdapterWeights, made: Compressed, bounds: Bounds, prompts: Sequence[str], tenant: str
    ) -> Divergence:
        """How far the answers are apart. Raises AdapterInvalid `too_lossy`."""
        _check("max_error", "relative error", made.relative_error, bounds.max_error)
        engine, trials = self._engine, self._trials
        with trials.on_trial(engine, weights) as original, trials.on_trial(engine, _weights(made)) as changed:
            try:
                divergence = await measure(self._engine, prompts, original, changed, tenant)
            except ModelOutputInvalid:
                text = "With this adapter the model's output has no valid numbers, so nothing can be measured."
                raise AdapterInvalid(text, code="model_output_invalid", param="adapter") from None
        _check("max_divergence", "mean KL divergence", divergence.mean_kl, bounds.max_divergence)
        return divergence

    def _told(
        self, source: AdapterRef, made: Compressed, divergence: Divergence, prompts: Sequence[str]
    ) -> dict[str, Any]:
        """Fields of the manifest. Numbers in six digits, so that the last bits of a sum do not make another adapter."""
        origin = self._registry.info(f"sha256:{source.digest}", source.tenant)
        worst = max(made.errors, key=lambda module: made.errors[module])
        return {
            "kind": origin.kind,
            "warnings": [asdict(notice) for notice in origin.warnings],
            "provenance": {"type": "compress", "source": source.digest},
            "compression": {
                "relative_error": _digits(made.relative_error),
                "worst_module": {"name": worst, "relative_error": _digits(made.errors[worst])},
                "divergence": {key: _digits(value) for key, value in asdict(divergence).items()}
                | {"probe": _hash(prompts)},
            },
            "module_errors": {module: _digits(error) for module, error in made.errors.items()},
        }


def _check_collection(sources: Sequence[AdapterRef], recipe: JointRecipe, max_rank: int) -> None:
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"`{twice}` is named twice.", code="duplicate_adapter", param="adapters")
    if recipe.rank > max_rank:
        text = f"The rank {recipe.rank} is above the server's limit of {max_rank} (`--max-rank`)."
        raise AdapterInvalid(text, code="rank_limit", param="rank")


def _collection(sources: Sequence[AdapterRef]) -> dict[str, Any]:
    """What the bases were made of. It stands in the manifest alone: the log's records name it by its hash."""
    return {"sources": sorted(source.digest for source in sources)}


def _joint_provenance(sources: Sequence[AdapterRef], recipe: JointRecipe, member: Member) -> dict[str, Any]:
    joint = {"cluster": member.cluster, "adapters": len(sources), "sources": _hash(_collection(sources)["sources"])}
    return {"method": recipe.method, "parameters": recipe.parameters | joint}


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


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
