"""A recipe is the same bytes, and expands to the same bytes, wherever and with however many threads."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters_store.errors import AdapterCorrupt, AdapterInvalid
from adapters_store.generation import generator_file, recipe
from adapters_store.generation.generator import Generator
from adapters_store.generation.icm import Cvae
from adapters_store.generation.layout import Layout, ModuleLayout
from adapters_store.generation.statistics import Statistics
from tests.adapters_store.generation.support import TASKS, TINY, trained
from tests.adapters_store.support import craft, entry

EXPAND = """
import sys, torch
from pathlib import Path
from adapters_store.formats.forms_file import dump
from adapters_store.generation import generator_file, recipe
torch.set_num_threads(int(sys.argv[3]))
made = recipe.expand(recipe.decode(Path(sys.argv[1])), generator_file.load(Path(sys.argv[2])))
assert torch.get_num_threads() == int(sys.argv[3])
[data] = dump({name: (form,) for name, form in made.items()}).values()
sys.stdout.buffer.write(data)
"""


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Generator, Path]:
    path = tmp_path / "generator"
    return generator_file.save(trained().generator, path), path


def made_of(generator: Generator, task: str = "left", seed: int = 1) -> recipe.Recipe:
    known = generator.tasks[task]
    return recipe.make(generator, known.condition, known.statistics, seed=seed)


def test_the_same_bytes_everywhere(saved: tuple[Generator, Path], tmp_path: Path) -> None:
    generator, path = saved
    data = recipe.encode(made_of(generator))
    assert recipe.encode(made_of(generator_file.load(path))) == data
    assert recipe.encode(made_of(generator, seed=2)) != data != recipe.encode(made_of(generator, "right"))
    (tmp_path / "recipe").write_bytes(data)
    outputs = {
        hashlib.sha256(
            subprocess.run(
                [sys.executable, "-c", EXPAND, str(tmp_path / "recipe"), str(path), threads],
                check=True,
                capture_output=True,
            ).stdout
        ).hexdigest()
        for threads in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_decoding_gives_the_recipe(saved: tuple[Generator, Path], tmp_path: Path) -> None:
    generator, _ = saved
    given = made_of(generator)
    (tmp_path / "recipe").write_bytes(recipe.encode(given))
    found = recipe.decode(tmp_path / "recipe")
    assert (found.generator, found.output) == (given.generator, given.output)
    assert recipe.encode(found) == recipe.encode(given)


def test_a_seed_is_a_z(saved: tuple[Generator, Path]) -> None:
    generator, _ = saved
    known = generator.tasks["left"]
    z = recipe.draw(generator, 7)
    pinned = recipe.make(generator, known.condition, known.statistics, z=z)
    assert recipe.encode(pinned) == recipe.encode(made_of(generator, seed=7))
    for options in ({}, {"z": z, "seed": 7}):
        with pytest.raises(ValueError, match="either"):
            recipe.make(generator, known.condition, known.statistics, **options)  # type: ignore[arg-type]


def test_factors_of_the_layouts_type(saved: tuple[Generator, Path]) -> None:
    """float32 with its last bits at zero, so that sums in another order are the same."""
    generator, _ = saved
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        other = replace(generator, layout=replace(generator.layout, dtype=dtype))
        for form in recipe.expand(made_of(other), other).values():
            assert form.a.dtype == form.b.dtype == dtype
            assert form.d.dtype == torch.float32
            fraction, _ = torch.frexp(form.a.double())
            assert torch.equal((fraction * (1 << 16)).round(), fraction * (1 << 16))


@pytest.mark.parametrize("part", ["condition", "z", "mean", "std"])
def test_lengths_that_the_generator_does_not_take(saved: tuple[Generator, Path], part: str) -> None:
    generator, _ = saved
    good = made_of(generator)
    longer = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in recipe._tensors(good).items() if name == part}
    statistics = Statistics(longer.get("mean", good.statistics.mean), longer.get("std", good.statistics.std))
    bad = replace(
        good, condition=longer.get("condition", good.condition), z=longer.get("z", good.z), statistics=statistics
    )
    with pytest.raises(AdapterInvalid) as caught:
        recipe.expand(bad, generator)
    assert caught.value.code == "generator_invalid"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"condition": torch.ones(3)}, "bad_condition"),
        ({"condition": torch.tensor([1.0, 2.0, float("inf"), 3.0])}, "bad_condition"),
        ({"z": torch.ones(9)}, "bad_latent"),
        ({"z": torch.full((8,), float("nan"))}, "bad_latent"),
        ({"seed": -1}, "bad_seed"),
        ({"seed": 1 << 64}, "bad_seed"),
        ({"statistics": Statistics(torch.zeros(8), torch.full((8,), 3e38))}, "not_finite"),
    ],
)
def test_what_cannot_be_made(saved: tuple[Generator, Path], changes: dict[str, object], code: str) -> None:
    generator, _ = saved
    known = generator.tasks["left"]
    options = {"condition": known.condition, "statistics": known.statistics, **changes}
    if not options.keys() & {"z", "seed"}:
        options["seed"] = 1
    with pytest.raises(AdapterInvalid) as caught:
        recipe.make(generator, **options)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_another_generator_and_another_result(saved: tuple[Generator, Path]) -> None:
    generator, _ = saved
    good = made_of(generator)
    with pytest.raises(AdapterInvalid) as caught:
        recipe.expand(good, replace(generator, digest="0" * 64))
    assert caught.value.code == "generator_invalid"
    with pytest.raises(AdapterCorrupt) as damaged:
        recipe.expand(replace(good, z=good.z + 1), generator)
    assert damaged.value.code == "recipe_differs"


TOLD = {"schema": 1, "generator": "a" * 64, "output": "b" * 64}
SOUND = {"condition": torch.ones(4), "mean": torch.ones(8), "std": torch.ones(8), "z": torch.ones(8)}


def hostile() -> dict[str, bytes]:
    from adapters_store.generation.container import dump

    sound = dump(TOLD, SOUND)
    told = {"__metadata__": {"polyrank": "{}"}}
    return {
        "empty": b"",
        "cut": sound[:-1],
        "more": sound + b"\0",
        "no metadata": craft({"z": entry([1])}, b"\0" * 4),
        "metadata of another": craft({"__metadata__": {"format": "pt"}, "z": entry([1])}, b"\0" * 4),
        "no json": craft({"__metadata__": {"polyrank": "{"}, "z": entry([1])}, b"\0" * 4),
        "deep json": craft({"__metadata__": {"polyrank": "[" * 20_000}, "z": entry([1])}, b"\0" * 4),
        "a list": craft({"__metadata__": {"polyrank": "[]"}, "z": entry([1])}, b"\0" * 4),
        "huge shape": craft({**told, "z": entry([1 << 30])}, b"\0" * 4),
        "wrong type": craft({**told, "z": entry([1], dtype="F16", size=2)}, b"\0" * 2),
        "another schema": dump({**TOLD, "schema": 2}, SOUND),
        "a part lacks": dump(TOLD, {name: tensor for name, tensor in SOUND.items() if name != "std"}),
        "a part too many": dump(TOLD, {**SOUND, "more": torch.ones(1)}),
        "a matrix": dump(TOLD, {**SOUND, "z": torch.ones(2, 4)}),
        "lengths differ": dump(TOLD, {**SOUND, "std": torch.ones(7)}),
        "NaN": dump(TOLD, {**SOUND, "z": torch.full((8,), float("nan"))}),
        "negative": dump(TOLD, {**SOUND, "std": -torch.ones(8)}),
    }


@pytest.mark.parametrize("name", hostile())
def test_files_of_strangers(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").write_bytes(hostile()[name])
    with pytest.raises(AdapterInvalid) as caught:
        recipe.decode(tmp_path / "recipe")
    assert caught.value.code == "generator_invalid"


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    from adapters_store.generation.container import dump

    (tmp_path / "recipe").write_bytes(dump(TOLD, SOUND))
    assert recipe.decode(tmp_path / "recipe").generator == "a" * 64


@pytest.mark.parametrize("part", ["a", "b", "bias"])
def test_what_is_not_finite_is_refused(part: str) -> None:
    """A deviation that float32 holds, and times what the model makes no longer."""
    torch.manual_seed(0)
    layout = Layout((ModuleLayout("q_proj", 2, 8, 8, 1.0, bias=True),), torch.float32)
    model = Cvae(TINY, layout.numbers, 4).eval().requires_grad_(False)
    generator = Generator("", layout, model, {}, "a" * 64)
    mean, std = torch.zeros(3), torch.ones(3)
    recipe.make(generator, torch.ones(4), Statistics(mean, std), seed=1)
    std[["a", "b", "bias"].index(part)] = 3.4e38
    assert model.last.bias is not None
    model.last.bias.fill_(10)
    with pytest.raises(AdapterInvalid) as caught:
        recipe.make(generator, torch.ones(4), Statistics(mean, std), seed=1)
    assert caught.value.code == "not_finite"


def test_sizes(saved: tuple[Generator, Path]) -> None:
    layout = saved[0].layout
    found = recipe.sizes(100, layout, 10_000)
    assert found.lora == 4 * layout.numbers + 4 * 2 * len(layout.modules)
    assert found.break_even is not None
    count = found.break_even
    assert count * found.lora > count * 100 + 10_000
    assert (count - 1) * found.lora <= (count - 1) * 100 + 10_000
    assert recipe.sizes(found.lora, layout, 10_000).break_even is None


def test_every_task_has_its_own(saved: tuple[Generator, Path]) -> None:
    assert len({made_of(saved[0], task).output for task in TASKS}) == len(TASKS)
