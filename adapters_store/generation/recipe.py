"""An adapter as what a generator needs to make it: a few kilobytes instead of its factors."""

import hashlib
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters_store.errors import AdapterCorrupt, AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.generation.container import Container, dump
from adapters_store.generation.generator import Generator
from adapters_store.generation.icm import MAX_CONDITION
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import Statistics, restore
from adapters_store.limits import HeaderLimits
from adapters_store.merging.algebra import one_thread

RECIPE_FILE = "adapter_recipe.safetensors"
SCHEMA = 1
MAX_BYTES = 64 << 20
MAX_SEED = 1 << 63
_BITS = 16  # of a float32 result that are kept
_PARTS = ("condition", "mean", "std", "z")
_HEADER = HeaderLimits(64 << 10, len(_PARTS))
_WHAT = "The recipe"


@dataclass(frozen=True, slots=True)
class Recipe:
    """generator: digest of its file; condition: float32 [condition]; statistics: of each tensor; z: float32 [latent],
    pinned, so that the adapter is always the same; output: digest of its tensors."""

    generator: str
    condition: torch.Tensor
    statistics: Statistics
    z: torch.Tensor
    output: str


def make(
    generator: Generator,
    condition: torch.Tensor,
    statistics: Statistics,
    *,
    z: torch.Tensor | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe of an adapter: with this z, or with the one that is drawn from N(0, I) by this seed.

    Raises AdapterInvalid `bad_condition` or `bad_latent` (length, or not finite), `bad_seed`, `not_finite` for an
    adapter that is not, and ValueError unless exactly one of z and seed is given, or for a generator without a digest.
    """
    if (z is None) == (seed is None) or not generator.digest:
        raise ValueError("give a generator that was saved, and either z or a seed")
    z = draw(generator, seed) if seed is not None else z
    assert z is not None
    _check_vector(condition, generator.condition, "condition")
    _check_vector(z, generator.latent, "latent")
    recipe = Recipe(generator.digest, condition.float(), statistics, z.float(), "")
    return replace(recipe, output=_digest(_expanded(recipe, generator), generator.layout))


def draw(generator: Generator, seed: int) -> torch.Tensor:
    """z from N(0, I), float32 [latent]; the same for the same seed. Raises AdapterInvalid `bad_seed`."""
    if not 0 <= seed < MAX_SEED:
        raise AdapterInvalid(f"A seed is 0 to {MAX_SEED - 1}.", code="bad_seed", param="seed")
    return torch.randn(generator.latent, generator=torch.Generator().manual_seed(seed))


def expand(recipe: Recipe, generator: Generator) -> dict[str, LowRank]:
    """The adapter, byte for byte the one that `make` saw.

    Computed in float64 on one thread and rounded at the end to the layout's type, float32 to 16 bits of it: sums in
    another order, on another kind of CPU, then end alike but for one number in 10^10 or so. Memory: the decoder in
    float64, and what `cost.decode_bytes` says for a piece; `cost.check_cost` bounds it, and the time.

    Raises AdapterInvalid `generator_invalid` for another generator, AdapterCorrupt `recipe_differs` if the result is
    not the pinned one.
    """
    if recipe.generator != generator.digest:
        raise AdapterInvalid("The recipe is one of another generator.", code="generator_invalid")
    check_fits(recipe, generator)
    made = _expanded(recipe, generator)
    if _digest(made, generator.layout) != recipe.output:
        raise AdapterCorrupt(
            "The generator made another adapter of this recipe than the one that was stored. Generate it again.",
            code="recipe_differs",
        )
    return made


def check_fits(recipe: Recipe, generator: Generator) -> None:
    """Raises AdapterInvalid `generator_invalid` unless the vectors have the lengths that the generator takes."""
    parts = len(generator.layout.counts())
    wanted = {"condition": generator.condition, "mean": parts, "std": parts, "z": generator.latent}
    for part, tensor in _tensors(recipe).items():
        if tensor.shape != (wanted[part],):
            text = f"The recipe's `{part}` has {tensor.numel()} numbers; its generator takes {wanted[part]}."
            raise AdapterInvalid(text, code="generator_invalid")


def encode(recipe: Recipe) -> bytes:
    """The file of a recipe; equal ones give equal bytes."""
    told = {"schema": SCHEMA, "generator": recipe.generator, "output": recipe.output}
    return dump(told, _tensors(recipe))


def decode(path: Path) -> Recipe:
    """The recipe of a file. Raises AdapterInvalid `generator_invalid`, OSError."""
    with path.open("rb") as stream:
        if path.stat().st_size > MAX_BYTES:
            raise AdapterInvalid(f"The recipe is larger than {MAX_BYTES} bytes.", code="generator_invalid")
        file = Container(path, stream, _HEADER, _WHAT)
        told: Any = file.told
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            file.refuse(f"this server reads schema {SCHEMA}")
        generator, output = str(told.get("generator")), str(told.get("output"))
        shapes = {part: (math.prod(file.shape(part)),) for part in _PARTS}
        if shapes["condition"][0] > MAX_CONDITION or shapes["mean"] != shapes["std"]:
            file.refuse("its vectors have lengths that no generator takes")
        file.require(shapes)
        found = {part: file.read(part) for part in _PARTS}
    if bool((found["std"] < 0).any()):
        file.refuse("`std` has negative numbers")
    return Recipe(generator, found["condition"], Statistics(found["mean"], found["std"]), found["z"], output)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a recipe, of the factors that it stands for, and of the generator, which is stored once; break_even: how
    many generated adapters take less, the generator included, than their factors would, or None if no number does."""

    recipe: int
    lora: int
    generator: int
    break_even: int | None


def sizes(recipe_bytes: int, layout: Layout, generator_bytes: int) -> Sizes:
    saved = layout.lora_bytes - recipe_bytes
    needed = generator_bytes // saved + 1 if saved > 0 else None
    return Sizes(recipe_bytes, layout.lora_bytes, generator_bytes, needed)


def _tensors(recipe: Recipe) -> Mapping[str, torch.Tensor]:
    statistics = recipe.statistics
    return {"condition": recipe.condition, "mean": statistics.mean, "std": statistics.std, "z": recipe.z}


def _check_vector(vector: torch.Tensor, length: int, what: str) -> None:
    if vector.shape != (length,) or not bool(vector.isfinite().all()):
        text = f"The {what} is {length} finite numbers for this generator."
        raise AdapterInvalid(text, code=f"bad_{what}", param=what)


@torch.no_grad()
def _expanded(recipe: Recipe, generator: Generator) -> dict[str, LowRank]:
    with one_thread():
        model = deepcopy(generator.model).double()
        z = recipe.z.double().view(model.pieces, -1)
        condition = recipe.condition.double()[None]
        rows = [model.decode(z[piece : piece + 1], condition, torch.tensor([piece])) for piece in range(model.pieces)]
        vector = restore(model.joined(torch.cat(rows)), recipe.statistics, generator.layout)
    made = generator.layout.split(_rounded(vector))
    tensors = (tensor for form in made.values() for tensor in (form.a, form.b, form.bias) if tensor is not None)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise AdapterInvalid("The generator makes numbers that are not finite of this.", code="not_finite")
    return made


def _rounded(vector: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(vector)
    return torch.ldexp((fraction * (1 << _BITS)).round() / (1 << _BITS), exponent)


def _digest(modules: Mapping[str, LowRank], layout: Layout) -> str:
    sha = hashlib.sha256()
    for module in layout.modules:
        form = modules[module.name]
        for tensor in (form.a, form.b, form.d, form.bias):
            if tensor is not None:
                sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
