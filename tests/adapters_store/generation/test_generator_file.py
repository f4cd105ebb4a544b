"""A generator comes back as it was written; a stranger's file is refused by name, and before it can take memory."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adapters_store.errors import AdapterInvalid
from adapters_store.generation import generator_file
from adapters_store.generation.container import dump
from adapters_store.limits import Limits
from tests.adapters_store.generation.support import TASKS, trained
from tests.adapters_store.support import BASE, craft

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator_file.save(trained().generator, tmp_path / "generator")
    return tmp_path / "generator"


def parts(path: Path) -> tuple[dict[str, Any], Tensors]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["polyrank"]), load_file(path)


def test_there_and_back(path: Path) -> None:
    given, found = trained().generator, generator_file.load(path, BASE)
    assert (found.base, found.layout, found.settings) == (given.base, given.layout, given.settings)
    assert list(found.tasks) == list(TASKS)
    assert not found.model.training
    state = found.model.state_dict()
    assert state.keys() == given.model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.model.state_dict().items())
    for name, task in given.tasks.items():
        other = found.tasks[name]
        assert torch.equal(task.condition, other.condition)
        assert torch.equal(task.latent, other.latent)
        assert torch.equal(task.statistics.std, other.statistics.std)
    again = generator_file.save(found, path.with_name("again"))
    assert again.digest == found.digest
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_the_base_must_be_this_one(path: Path) -> None:
    modules = dict(BASE.modules)
    name = "model.layers.0.self_attn.q_proj"
    for base in (
        replace(BASE, fingerprint="0" * 64),
        replace(BASE, modules={key: spec for key, spec in modules.items() if key != name}),
        replace(BASE, modules={**modules, name: replace(modules[name], out_features=9)}),
    ):
        with pytest.raises(AdapterInvalid) as caught:
            generator_file.load(path, base)
        assert caught.value.code == "base_mismatch"


def test_limits(path: Path) -> None:
    for limits, code in ((Limits(max_rank=1), "rank_limit"), (Limits(form_bytes=100), "adapter_too_large")):
        with pytest.raises(AdapterInvalid) as caught:
            generator_file.load(path, BASE, limits)
        assert caught.value.code == code


Change = Callable[[dict[str, Any], Tensors], object]
HUGE_RANK = "a rank that is huge"
CHANGES: dict[str, Change] = {
    "schema": lambda told, _: told.update(schema=2),
    "no schema": lambda told, _: told.pop("schema"),
    "no base": lambda told, _: told.update(base=None),
    "no layout": lambda told, _: told.pop("layout"),
    "a layout of another": lambda told, _: told.update(layout=[]),
    HUGE_RANK: lambda told, _: told["layout"]["modules"][0].update(rank=1 << 30),
    "another type": lambda told, _: told["layout"].update(dtype="I64"),
    "a million stages": lambda told, _: told["settings"].update(channels=[1] * 1_000_000),
    "channels that are huge": lambda told, _: told["settings"].update(channels=[1 << 30] * 3),
    "channels of text": lambda told, _: told["settings"].update(channels="abc"),
    "a latent that is huge": lambda told, _: told["settings"].update(latent=1 << 40),
    "another latent": lambda told, _: told["settings"].update(latent=9),
    "an unknown setting": lambda told, _: told["settings"].update(more=1),
    "a condition that is huge": lambda told, _: told.update(condition=1 << 40),
    "another condition": lambda told, _: told.update(condition=5),
    "no tasks": lambda told, _: told.update(tasks=[]),
    "a task twice": lambda told, _: told.update(tasks=["left", "left"]),
    "tasks of numbers": lambda told, _: told.update(tasks=[1, 2]),
    "too many tasks": lambda told, _: told.update(tasks=[str(number) for number in range(1001)]),
    "a task that has no tensors": lambda told, _: told.update(tasks=["left", "right", "third"]),
    "a task that no one names": lambda told, _: told.update(tasks=["left"]),
    "a tensor lacks": lambda _, tensors: tensors.pop("model.last.bias"),
    "a tensor too many": lambda _, tensors: tensors.update({"model.more": torch.ones(1)}),
    "another shape": lambda _, tensors: tensors.update({"model.last.bias": torch.ones(2)}),
    "NaN": lambda _, tensors: tensors["model.widen.weight"].view(-1)[3:4].fill_(float("nan")),
    "infinity": lambda _, tensors: tensors["task.1.mean"].fill_(float("inf")),
    "a negative deviation": lambda _, tensors: tensors["task.0.std"].neg_(),
    "another dtype": lambda _, tensors: tensors.update({"model.last.bias": torch.ones(1).half()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_of_strangers(name: str, path: Path) -> None:
    told, tensors = parts(path)
    CHANGES[name](told, tensors)
    path.write_bytes(dump(told, tensors))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterInvalid) as caught:
            generator_file.load(path, BASE)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.code == ("rank_limit" if name == HUGE_RANK else "generator_invalid")
    assert str(path) not in caught.value.message


def test_files_that_are_none(path: Path) -> None:
    data = path.read_bytes()
    for other in (b"", data[:100], data[:-1], data + b"\0", b"PK\x03\x04" + data, craft({})):
        path.write_bytes(other)
        with pytest.raises(AdapterInvalid) as caught:
            generator_file.load(path)
        assert caught.value.code == "generator_invalid"
