"""What a stored adapter's files mean: an upload's two, forms as they are, or a recipe and its generator."""

from collections.abc import Container, Mapping
from pathlib import Path

from adapters_store.formats import forms_file, importer, peft
from adapters_store.forms import AdapterWeights, BaseSpec
from adapters_store.generation.files import RecipeLoader
from adapters_store.generation.recipe import RECIPE_FILE
from adapters_store.limits import Limits
from adapters_store.variants import NO_KNOBS, Variant, require

_MADE = (forms_file.FORMS_FILE, RECIPE_FILE)


def exported(files: Container[str], filename: str) -> bool:
    """Whether a file of PEFT's is to be written of an adapter that has these files and no such one."""
    return filename in (peft.CONFIG_FILE, peft.WEIGHTS_FILE) and any(name in files for name in _MADE)


class Loader:
    """Loads the adapters of one base, whatever their files. Thread-safe."""

    def __init__(self, base: BaseSpec, limits: Limits) -> None:
        self._base = base
        self._limits = limits
        self._uploads = importer.Loader(base, limits)
        self._recipes = RecipeLoader(base, limits)

    def load(self, paths: Mapping[str, Path], key: str, variant: Variant) -> AdapterWeights:
        """The forms, in memory of their own, under `key`. paths: of verified files, by name.

        Raises AdapterInvalid, AdapterCorrupt, KnobRefused, OSError.
        """
        if RECIPE_FILE in paths:
            require(NO_KNOBS, variant)
            return self._recipes.load(paths, key)
        if forms_file.FORMS_FILE in paths:
            require(NO_KNOBS, variant)
            return AdapterWeights(key, forms_file.load(paths, self._base, self._limits))
        return self._uploads.load(paths[peft.CONFIG_FILE].read_bytes(), paths[peft.WEIGHTS_FILE], key, variant)

    def upload(self, config: bytes, weights: Path) -> AdapterWeights:
        """The forms of an upload that is not stored, under no digest. Raises AdapterInvalid, OSError."""
        return self._uploads.load(config, weights, "")
