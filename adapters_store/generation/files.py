"""A generated adapter as the store keeps it: its recipe, and its generator, which all its siblings share."""

from collections.abc import Mapping
from pathlib import Path

from adapters_store.bucket import Source
from adapters_store.candidate import FormFiles
from adapters_store.forms import AdapterWeights, BaseSpec
from adapters_store.generation.generator import Generator
from adapters_store.generation.generator_file import GENERATOR_FILE, load
from adapters_store.generation.opened import OpenedGenerators
from adapters_store.generation.recipe import RECIPE_FILE, Recipe, decode, encode, expand
from adapters_store.limits import Limits

KIND = "icm_lora"


def files_of(recipe: Recipe, generator: Generator, path: Path) -> FormFiles:
    """For `AdapterRegistry.add_forms`. path: the generator's file. The adapter's size is that of its recipe."""
    layout = generator.layout
    ranks = [module.rank for module in layout.modules]
    facts = {
        "forms": ["low_rank"],
        "rank": {"min": min(ranks), "max": max(ranks)},
        "parameters": layout.numbers,
    }
    paths: dict[str, Source] = {RECIPE_FILE: encode(recipe), GENERATOR_FILE: path}
    return FormFiles(paths, facts, len(layout.modules), RECIPE_FILE)


class RecipeLoader:
    """Expands the recipes of one base. Thread-safe."""

    def __init__(self, base: BaseSpec, limits: Limits) -> None:
        self._base = base
        self._limits = limits
        self._opened = OpenedGenerators()

    def load(self, paths: Mapping[str, Path], key: str) -> AdapterWeights:
        """The forms of `files_of`'s files, under `key`. Raises AdapterInvalid, AdapterCorrupt, OSError."""
        recipe = decode(paths[RECIPE_FILE])
        path = paths[GENERATOR_FILE]
        generator = self._opened.get(recipe.generator, lambda: load(path, self._base, self._limits))
        modules = expand(recipe, generator)
        return AdapterWeights(key, {name: (form,) for name, form in modules.items()})
