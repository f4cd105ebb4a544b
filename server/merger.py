"""`merge`: a new version made of several adapters, as a job; the same recipe always gives the same bytes."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store import canonical, names
from adapters_store.candidate import FormFiles
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.forms_file import FORMS_FILE
from adapters_store.formats.peft import CONFIG_FILE, KIND
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.merging import methods, parameters
from adapters_store.merging.parts import low_rank
from adapters_store.merging.search import Found
from adapters_store.registry import AdapterRegistry
from server import merge_work
from server.weight_finder import WeightFinder

ALGORITHM = 1  # to be raised when a method's result changes: recipes of before then give other digests
Replaced = Callable[[str, str, int], Awaitable[None]]
SEARCHED = "weight_search"
SEARCH_SHARE = 0.9  # of such a job's progress
MERGEABLE = frozenset({"low_rank", "shared_basis"})


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge that may begin. order: for the job; recipe: digest of all that its result depends on; stored: what the
    name holds, if that is this very merge."""

    order: Mapping[str, Any]
    recipe: str
    stored: AdapterInfo | None


class Merger:
    """Plans merges, and does what `Jobs` asks of its kinds: sources to files, and the merged file into the store.

    replaced: is told tenant, name and version of what has become current.
    """

    module = merge_work.__name__

    def __init__(self, registry: AdapterRegistry, replaced: Replaced, finder: WeightFinder) -> None:
        self._registry = registry
        self._replaced = replaced
        self._finder = finder

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, float]],
        method: str,
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> Plan:
        """Refuses what can be refused before any work. Reads no adapter; may ask the store which version is current.

        A source with knobs counts as it is without any choice.

        Raises AdapterInvalid `bad_name`, `unknown_method`, `unknown_parameter`, `bad_parameter`, `rank_limit` or
        `feature_unsupported`; AdapterConflict, PreconditionFailed.
        """
        registry = self._registry
        names.check_name(name, *registry.base.names)
        if method == SEARCHED and any(weight != 1.0 for _, weight in sources):
            raise AdapterInvalid(f"`{SEARCHED}` finds the weights: give none.", code="bad_parameter", param="sources")
        told = parameters.parse(methods.find(method).parameters, method, given).model_dump(exclude_none=True)
        infos = [registry.info(f"sha256:{source.digest}", source.tenant) for source, _ in sources]
        for info in infos:
            check_mergeable(info)
        is_sum = method == "cat" or (method == SEARCHED and "rank" not in told)
        ranks = sum(info.rank.max for info in infos) if is_sum else told.get("rank", 0)
        if ranks > registry.limits.max_rank:
            limit = f"the server's limit of {registry.limits.max_rank} (`--max-rank`)"
            raise AdapterInvalid(f"The result's rank, {ranks}, is above {limit}.", code="rank_limit", param="rank")
        what = {
            "method": method,
            "parameters": told,
            "sources": [{"digest": source.digest, "weight": float(weight)} for source, weight in sources],
        }
        base = registry.base.fingerprint
        recipe = canonical.digest(canonical.dump({"algorithm": ALGORITHM, "base": base, **what}))
        stored = self._current(name, tenant)
        if stored is None or stored.provenance.get("recipe") != recipe:
            names.check_match(stored.digest if stored else None, if_match)
            if stored is not None and if_match is None and not replace:
                raise names.taken(name, stored.version, stored.digest)
            registry.require_room(name, tenant)
            stored = None
        order = {"name": name, "if_match": if_match, "replace": replace, "recipe": recipe, **what}
        return Plan({**order, "max_rank": registry.limits.max_rank}, recipe, stored)

    async def prepare(
        self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Callable[[float], None]
    ) -> None:
        """One adapter in memory at a time; of a search, the weights are found first, by the engine."""
        found: Found | None = None
        if order["method"] == SEARCHED:
            digests = [source["digest"] for source in order["sources"]]
            told = order["parameters"]
            found = await self._finder.find(digests, told, tenant, lambda done: progress(SEARCH_SHARE * done))
        for index, source in enumerate(order["sources"]):
            await asyncio.to_thread(self._write, index, source["digest"], folder)
        exact = order["parameters"].get("mode") == "peft_exact"
        rslora = exact and await asyncio.to_thread(self._uses_rslora, order["sources"][0]["digest"], tenant)
        await asyncio.to_thread(merge_work.write_base, folder, self._registry.base.modules, rslora, found)

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The result: `name`, `version`, `digest` and `new`, which is false where it was current already."""
        made = FormFiles({FORMS_FILE: folder / FORMS_FILE}, told["facts"], told["matched"])
        provenance = {key: order[key] for key in ("method", "parameters", "sources", "recipe")} | _searched(order, told)
        fields = {"kind": KIND, "warnings": [], "provenance": {"type": "merge", **provenance}}
        fields |= {"clusters": told["clusters"]} if told["clusters"] else {}
        info, created = await asyncio.to_thread(
            self._registry.add_forms,
            order["name"],
            made,
            "merge",
            fields,
            tenant=tenant,
            if_match=order["if_match"],
            replace=order["replace"],
        )
        if created:
            await self._replaced(tenant, info.name, info.version)
        return {"name": info.name, "version": info.version, "digest": info.digest, "new": created}

    def _current(self, name: str, tenant: str) -> AdapterInfo | None:
        self._registry.catalogue.refresh_name(tenant, name)
        return self._registry.current(name, tenant)

    def _write(self, index: int, digest: str, folder: Path) -> None:
        weights = self._registry.load(digest)
        merge_work.write_source(folder, index, {name: low_rank(name, forms) for name, forms in weights.modules.items()})

    def _uses_rslora(self, digest: str, tenant: str) -> bool:
        _, pieces = self._registry.open_file(f"sha256:{digest}", CONFIG_FILE, tenant)
        return bool(json.loads(b"".join(pieces)).get("use_rslora"))


def _searched(order: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Of a search: the weights that it found, their loss, and the examples by digest, for they may be long."""
    if "found" not in told:
        return {}
    found, examples = told["found"], order["parameters"]["examples"]
    pairs = zip(order["sources"], found["weights"], strict=True)
    short = {"count": len(examples), "sha256": canonical.digest(canonical.dump(examples))}
    return {
        "sources": [{**source, "weight": weight} for source, weight in pairs],
        "loss": found["loss"],
        "parameters": {**order["parameters"], "examples": short},
    }


def check_mergeable(info: AdapterInfo) -> None:
    """Raises AdapterInvalid `feature_unsupported` for what is more than low-rank deltas that always act."""
    others = [f"`{form}`" for form in info.forms if form not in MERGEABLE]
    others += ["virtual tokens"] if info.virtual_tokens else []
    others += ["invocation tokens"] if info.invocation else []
    if others:
        raise _unmergeable(", ".join(others), info.name)


def _unmergeable(what: str, name: str) -> AdapterInvalid:
    text = f"`{name}` has {what}, which is no low-rank delta; only such can be merged."
    return AdapterInvalid(text, code="feature_unsupported", param="sources")
