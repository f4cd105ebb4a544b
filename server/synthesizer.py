"""`synthesize`: an adapter that a generator makes of a condition, tried out and stored as its recipe."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from adapters_store import canonical
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import AdapterWeights, Form
from adapters_store.generation import recipe as recipes
from adapters_store.generation.files import KIND, files_of
from adapters_store.generation.generator import Generator
from adapters_store.generation.orders import Wanted
from adapters_store.generation.recipe import Recipe, Sizes
from adapters_store.generators import GeneratorInfo, Generators
from adapters_store.info import AdapterInfo, BaseCheck, ModuleCount, Notice, Probe, Proof
from adapters_store.registry import AdapterRegistry
from server.engine.request import WeightedAdapter
from server.intake import KNOWN
from server.task_vectors import TaskVectors

Replaced = Callable[[str, str, int], Awaitable[None]]


class Tries(Protocol):
    """What is needed of the intake."""

    async def tried(self, load: Callable[[], AdapterWeights], name: str, tenant: str) -> Probe | Notice: ...


@dataclass(frozen=True, slots=True)
class _Made:
    recipe: Recipe
    weights: AdapterWeights
    bytes: int


class Synthesizer:
    """Nothing is stored on a refusal. replaced: is told tenant, name and version of what has become current."""

    def __init__(
        self,
        registry: AdapterRegistry,
        generators: Generators,
        vectors: TaskVectors,
        intake: Tries,
        replaced: Replaced,
    ) -> None:
        self._registry = registry
        self._generators = generators
        self._vectors = vectors
        self._intake = intake
        self._replaced = replaced

    async def synthesize(
        self,
        info: GeneratorInfo,
        name: str,
        wanted: Wanted,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]:
        """The version, and whether it is new. The same order gives the same content.

        Raises AdapterInvalid `unknown_task`, `missing_examples`, `bad_condition`, `bad_latent`, `bad_seed`,
        `not_finite` or `base_mismatch`, what the registry says of the name, and what the engine says of the examples.
        """
        check_wanted(info, wanted)
        condition = None
        if wanted.examples is not None:
            ref = wanted.adapter
            adapter = None if ref is None else WeightedAdapter(ref.digest, 1.0, ref.virtual_tokens, ref.invocation)
            condition = await self._vectors.find(wanted.examples, adapter, tenant)
        elif wanted.condition is not None:
            condition = torch.tensor(wanted.condition)
        with ExitStack() as stack:
            generator, path = await asyncio.to_thread(stack.enter_context, self._generators.opened(info))
            made = await asyncio.to_thread(_make, generator, wanted, condition)
            files = files_of(made.recipe, generator, path)
            asked: dict[str, Any] = {"tenant": tenant, "if_match": if_match, "replace": replace}
            known = await asyncio.to_thread(self._registry.require_free, name, files, **asked)
            tried = KNOWN if known else await self._intake.tried(lambda: made.weights, name, tenant)
            told = _told(info, wanted, made.recipe, recipes.sizes(made.bytes, generator.layout, info.bytes))
            proof = self._proof(info, files.matched, tried)
            stored, created = await asyncio.to_thread(
                self._registry.add_forms, name, files, "generate", told, proof=proof, **asked
            )
        if created:
            await self._replaced(tenant, stored.name, stored.version)
        return stored, created

    def _proof(self, info: GeneratorInfo, matched: int, tried: Probe | Notice) -> Proof:
        modules = ModuleCount(matched, len(self._registry.base.modules))
        base = BaseCheck("fingerprint", info.base.id)
        return Proof(modules, base, tried) if isinstance(tried, Probe) else Proof(modules, base, reason=tried)


def _make(generator: Generator, wanted: Wanted, condition: torch.Tensor | None) -> _Made:
    """The recipe, and what it makes; computed twice, so that what is stored is known to come out again."""
    task = generator.tasks[wanted.task or wanted.statistics_of or next(iter(generator.tasks))]
    statistics = generator.tasks[wanted.statistics_of].statistics if wanted.statistics_of else task.statistics
    z = _latent(generator, wanted)
    found = recipes.make(
        generator,
        task.condition if condition is None else condition,
        statistics,
        z=z,
        seed=None if z is not None else wanted.seed or 0,
    )
    modules: dict[str, tuple[Form, ...]] = {name: (form,) for name, form in recipes.expand(found, generator).items()}
    return _Made(found, AdapterWeights("", modules), len(recipes.encode(found)))


def check_wanted(info: GeneratorInfo, wanted: Wanted) -> None:
    """Refuses what cannot be meant, before any work. Raises AdapterInvalid."""
    for field, task in (("task", wanted.task), ("statistics_of", wanted.statistics_of)):
        if task is not None and task not in info.tasks:
            known = ", ".join(f"`{each}`" for each in list(info.tasks)[:8])
            text = f"The generator knows no task `{canonical.shorten(task)}`; among those it knows are {known}."
            raise AdapterInvalid(text, code="unknown_task", param=field)
    given = [each for each in (wanted.task, wanted.condition, wanted.examples) if each is not None]
    if len(given) != 1:
        text = "Give one of `task`, `condition` and `examples`."
        raise AdapterInvalid(text, code="missing_examples", param="task")
    if wanted.adapter is not None and wanted.examples is None:
        text = "`with_adapter` says whose hidden states on `examples` count: give examples, or leave it out."
        raise AdapterInvalid(text, code="missing_examples", param="with_adapter")
    if wanted.statistics_of is None and wanted.task is None and len(info.tasks) > 1:
        text = "Say by `statistics_of` which task's normalisation is to be undone."
        raise AdapterInvalid(text, code="unknown_task", param="statistics_of")
    if sum((wanted.seed is not None, wanted.z is not None, wanted.reconstruct)) > 1:
        text = "Give one of `seed`, `z` and `reconstruct`."
        raise AdapterInvalid(text, code="bad_latent", param="z")
    if wanted.reconstruct and wanted.task is None:
        text = "`reconstruct` takes what the encoder gave a `task`: name one."
        raise AdapterInvalid(text, code="bad_latent", param="reconstruct")
    for field, vector, length in (("condition", wanted.condition, info.condition), ("z", wanted.z, info.latent)):
        if vector is not None and len(vector) != length:
            code = "bad_condition" if field == "condition" else "bad_latent"
            raise AdapterInvalid(f"`{field}` is {length} numbers for this generator.", code=code, param=field)


def _latent(generator: Generator, wanted: Wanted) -> torch.Tensor | None:
    if wanted.reconstruct and wanted.task is not None:
        return generator.tasks[wanted.task].latent
    return None if wanted.z is None else torch.tensor(wanted.z)


def _told(info: GeneratorInfo, wanted: Wanted, recipe: Recipe, sizes: Sizes) -> dict[str, Any]:
    """Fields of the manifest. Vectors and texts by their digest: the recipe has the numbers."""
    source: dict[str, Any] = {}
    if wanted.task is not None:
        source = {"task": wanted.task}
    elif wanted.examples is not None:
        told = {"count": len(wanted.examples), "sha256": canonical.digest(canonical.dump(list(wanted.examples)))}
        source = {"examples": told, "with_adapter": wanted.adapter and wanted.adapter.digest}
    if wanted.reconstruct:
        source["reconstruct"] = True
    elif wanted.z is None:
        source["seed"] = wanted.seed or 0
    provenance = {
        "type": "generate",
        "method": KIND,
        "generator": info.digest,
        "condition": _sha256(recipe.condition),
        "z": _sha256(recipe.z),
        "statistics_of": wanted.statistics_of or wanted.task or info.tasks[0],
        "sizes": {**asdict(sizes), "share": float(f"{sizes.recipe / sizes.lora:.6g}")},
        **source,
    }
    return {"kind": KIND, "warnings": [], "provenance": provenance}


def _sha256(vector: torch.Tensor) -> str:
    return canonical.digest(vector.float().contiguous().numpy().tobytes())
