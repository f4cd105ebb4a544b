"""Trains generators as jobs: adapters of several tasks in, one generator out; equal orders give equal bytes."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters_store import canonical
from adapters_store.errors import AdapterInvalid
from adapters_store.generation import parameters
from adapters_store.generation.generator_file import GENERATOR_FILE
from adapters_store.generation.icm import MAX_CONDITION
from adapters_store.generation.orders import TaskSpec
from adapters_store.generators import GeneratorInfo, Generators
from adapters_store.info import AdapterInfo, AdapterRef
from adapters_store.merging.parts import low_rank
from adapters_store.registry import AdapterRegistry
from server import generation_work, merge_work
from server.engine.request import WeightedAdapter
from server.merger import check_mergeable
from server.task_vectors import TaskVectors

ALGORITHM = 1  # to be raised when the result of a training changes
VECTORS_SHARE = 0.3  # of a job's progress, where examples are computed


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training that may begin. order: for the job; recipe: digest of all that its result depends on; stored: what the
    name holds, if that is this very training's."""

    order: Mapping[str, Any]
    recipe: str
    stored: GeneratorInfo | None


class GeneratorTrainer:
    """Plans trainings, and does what `Jobs` asks of its kinds."""

    module = generation_work.__name__

    def __init__(self, registry: AdapterRegistry, generators: Generators, vectors: TaskVectors) -> None:
        self._registry = registry
        self._generators = generators
        self._vectors = vectors

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, str]],
        tasks: Mapping[str, TaskSpec],
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> TrainingPlan:
        """Refuses what can be refused before any work; blocking. sources: with the task of each; given: settings, as
        `generation.parameters.Training`.

        Raises AdapterInvalid `bad_name`, `missing_examples`, `unknown_task`, `bad_condition`, `feature_unsupported`,
        `base_mismatch`, `layouts_differ`, `too_few_samples`, `unknown_parameter`, `bad_parameter` or
        `generator_too_large`; AdapterConflict, PreconditionFailed.
        """
        registry = self._registry
        condition = _check_tasks([task for _, task in sources], tasks)
        infos = [registry.info(f"sha256:{source.digest}", source.tenant) for source, _ in sources]
        self._check_alike(infos)
        base = registry.base
        settings = parameters.settings(
            given, base.fingerprint, infos[0].parameters, condition or self._hidden_size(), len(infos)
        )
        what = {
            "sources": [{"digest": source.digest, "task": task} for source, task in sources],
            "tasks": {task: _task_order(spec) for task, spec in tasks.items()},
            "settings": parameters.to_json(settings),
        }
        recipe = canonical.digest(canonical.dump({"algorithm": ALGORITHM, "base": base.fingerprint, **what}))
        stored = self._generators.require_free(name, tenant, if_match, replace, recipe=recipe)
        order = {"name": name, "if_match": if_match, "replace": replace, "recipe": recipe, **what}
        return TrainingPlan(order, recipe, stored)

    async def prepare(
        self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Callable[[float], None]
    ) -> None:
        """Task vectors by the engine, one after another; then the sources, one adapter in memory at a time."""
        conditions = {}
        for number, (task, spec) in enumerate(order["tasks"].items()):
            conditions[task] = await self._condition(spec, tenant)
            progress(VECTORS_SHARE * (number + 1) / len(order["tasks"]))
        await asyncio.to_thread(generation_work.write_conditions, folder, conditions)
        for index, source in enumerate(order["sources"]):
            await asyncio.to_thread(self._write, index, source["digest"], folder)

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The result: what is told of the generator, and `new`, which is false where it was current already."""
        provenance = {
            "type": "train",
            "method": parameters.METHOD,
            "sources": order["sources"],
            "tasks": {task: _task_told(spec) for task, spec in order["tasks"].items()},
            "settings": {key: value for key, value in order["settings"].items() if key not in ("base", "memory")},
            "recipe": order["recipe"],
        }
        info, created = await asyncio.to_thread(
            self._generators.add,
            order["name"],
            folder / GENERATOR_FILE,
            "train",
            provenance,
            told["losses"],
            tenant=tenant,
            if_match=order["if_match"],
            replace=order["replace"],
        )
        return {**asdict(info), "new": created}

    async def _condition(self, spec: Mapping[str, Any], tenant: str) -> Sequence[float]:
        if "condition" in spec:
            given: Sequence[float] = spec["condition"]
            return given
        told = spec["adapter"]
        adapter = None if told is None else WeightedAdapter(**{**told, "invocation": tuple(told["invocation"])})
        vector = await self._vectors.find(spec["examples"], adapter, tenant, patient=True)
        numbers: list[float] = vector.tolist()
        return numbers

    def _write(self, index: int, digest: str, folder: Path) -> None:
        weights = self._registry.load(digest)
        modules = {name: low_rank(name, forms) for name, forms in weights.modules.items()}
        merge_work.write_source(folder, index, modules)

    def _check_alike(self, infos: Sequence[AdapterInfo]) -> None:
        """As far as the store tells; `Layout.common` looks at every tensor."""
        if len(infos) < 2:
            raise AdapterInvalid(
                "A generator learns from two adapters at least.", code="too_few_samples", param="sources"
            )
        for info in infos:
            check_mergeable(info)
            if info.base.fingerprint != self._registry.base.fingerprint:
                text = f"`{info.name}` belongs to `{info.base.id}`, not to the served base."
                raise AdapterInvalid(text, code="base_mismatch", param="sources")
            if (info.rank, info.modules, info.parameters) != (infos[0].rank, infos[0].modules, infos[0].parameters):
                text = f"{_shape(info)} and {_shape(infos[0])} are not alike. A generator learns adapters of"
                raise AdapterInvalid(f"{text} the same modules and ranks.", code="layouts_differ", param="sources")

    def _hidden_size(self) -> int:
        """To estimate memory by; training looks at the conditions themselves."""
        base = self._registry.base
        embedding = base.modules.get(base.input_embedding or "")
        return embedding.out_features if embedding is not None else 1


def _check_tasks(used: Sequence[str], tasks: Mapping[str, TaskSpec]) -> int | None:
    """The length of the conditions that are given, or None. Raises AdapterInvalid."""
    for task in used:
        if task not in tasks:
            text = f"The task `{canonical.shorten(task)}` has sources, but neither examples nor a condition."
            raise AdapterInvalid(text, code="missing_examples", param="tasks")
    for task, spec in tasks.items():
        if task not in used:
            text = f"No source is of the task `{canonical.shorten(task)}`."
            raise AdapterInvalid(text, code="unknown_task", param="tasks")
        if (spec.condition is None) == (spec.examples is None) or (spec.adapter is not None and spec.examples is None):
            text = f"Give the task `{canonical.shorten(task)}` `examples`, perhaps `with_adapter`, or a `condition`."
            raise AdapterInvalid(text, code="missing_examples", param=f"tasks.{task[:64]}")
    lengths = {len(spec.condition) for spec in tasks.values() if spec.condition is not None}
    if len(lengths) > 1 or not all(1 <= length <= MAX_CONDITION for length in lengths):
        text = f"Conditions are vectors of one length, at most {MAX_CONDITION}."
        raise AdapterInvalid(text, code="bad_condition", param="tasks")
    return next(iter(lengths), None)


def _task_order(spec: TaskSpec) -> dict[str, Any]:
    if spec.condition is not None:
        return {"condition": list(spec.condition)}
    adapter = None
    if spec.adapter is not None:
        adapter = {
            "digest": spec.adapter.digest,
            "virtual_tokens": spec.adapter.virtual_tokens,
            "invocation": list(spec.adapter.invocation),
        }
    return {"examples": list(spec.examples or ()), "adapter": adapter}


def _task_told(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Long texts and vectors by their digest."""
    if "condition" in spec:
        return {"condition": canonical.digest(canonical.dump(spec["condition"]))}
    told = {"count": len(spec["examples"]), "sha256": canonical.digest(canonical.dump(spec["examples"]))}
    return {"examples": told, "with_adapter": spec["adapter"] and spec["adapter"]["digest"]}


def _shape(info: AdapterInfo) -> str:
    ranks = f"{info.rank.min}" if info.rank.min == info.rank.max else f"{info.rank.min} to {info.rank.max}"
    return f"`{info.name}` (rank {ranks}, {info.modules.matched} modules, {info.parameters} numbers)"
