"""The work of training a generator, in a process of its own: files of factors in, a generator's file out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapters_store.forms import Form, LowRank
from adapters_store.generation import generator_file, parameters
from adapters_store.generation.generator_file import GENERATOR_FILE
from adapters_store.generation.training import Sample, train
from server.merge_work import read_source

_CONDITIONS = "conditions.json"


def write_conditions(folder: Path, conditions: Mapping[str, Sequence[float]]) -> None:
    """In the server: the condition of each task. Raises OSError."""
    (folder / _CONDITIONS).write_text(json.dumps(conditions))


def run(folder: Path, order: Mapping[str, Any], progress: Callable[[float], None]) -> dict[str, Any]:
    """Trains what `order` says on the sources that `write_source` has left, and writes `GENERATOR_FILE`; the loss of
    each epoch, in six digits. Raises AdapterInvalid, as `train`."""
    conditions = {
        task: torch.tensor(numbers) for task, numbers in json.loads((folder / _CONDITIONS).read_text()).items()
    }
    samples = [
        Sample(_Factors(read_source(folder, index)), conditions[source["task"]], source["task"])
        for index, source in enumerate(order["sources"])
    ]
    made = train(samples, parameters.of_json(order["settings"]), progress)
    generator_file.save(made.generator, folder / GENERATOR_FILE)
    return {"losses": [{name: float(f"{value:.6g}") for name, value in asdict(each).items()} for each in made.losses]}


class _Factors(Mapping[str, LowRank]):
    """A source as its low-rank deltas."""

    def __init__(self, source: Mapping[str, tuple[Form, ...]]) -> None:
        self._source = source

    def __getitem__(self, name: str) -> LowRank:
        (form,) = self._source[name]
        assert isinstance(form, LowRank)
        return form

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)
