"""A generator as one safetensors file. Uploads are untrusted: nothing is allocated before its shape was checked.

The header's metadata says schema, base fingerprint, layout, settings, the condition's size and the tasks' names.
Tensors are float32: `model.<name in the model>`, and of each task by its number `task.<n>.condition`, `.mean`, `.std`
and `.latent`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters_store import canonical
from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import BaseSpec
from adapters_store.generation.container import Container, dump
from adapters_store.generation.cost import check_cost
from adapters_store.generation.generator import Generator, Task
from adapters_store.generation.icm import MAX_CONDITION, Cvae, IcmSettings
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import Statistics
from adapters_store.limits import HeaderLimits, Limits

GENERATOR_FILE = "adapter_generator.safetensors"
SCHEMA = 1
MAX_TASKS, MAX_TASK_NAME = 1000, 128
_WHAT = "The generator's file"


def save(generator: Generator, path: Path) -> Generator:
    """Writes the file; the generator with its digest. Equal generators give equal bytes. Raises OSError."""
    told = {
        "schema": SCHEMA,
        "base": generator.base,
        "layout": generator.layout.to_json(),
        "settings": generator.settings.to_json(),
        "condition": generator.condition,
        "tasks": list(generator.tasks),
    }
    tensors = {f"model.{name}": tensor for name, tensor in generator.model.state_dict().items()}
    for number, task in enumerate(generator.tasks.values()):
        tensors |= {f"task.{number}.{part}": tensor for part, tensor in _parts(task).items()}
    data = dump(told, tensors)
    path.write_bytes(data)
    return replace(generator, digest=canonical.digest(data))


def load(
    path: Path, base: BaseSpec | None = None, limits: Limits | None = None, *, digest: str | None = None
) -> Generator:
    """The generator of a file, in memory of its own.

    base: that it must belong to, with modules of these shapes; limits: of a rank, and of the header; digest: of the
    file, if it is known. What making an adapter takes is bounded, see `cost.check_cost`, before the model is built.
    Raises AdapterInvalid `generator_invalid`, `base_mismatch`, `rank_limit`, `adapter_too_large` or
    `generator_too_large`, OSError.
    """
    limits = limits or Limits()
    header = HeaderLimits(limits.header.header_bytes, 4 * MAX_TASKS + limits.header.tensors)
    with path.open("rb") as stream:
        file = Container(path, stream, header, _WHAT)
        fingerprint, layout, settings, condition, names = _told(file)
        _check_base(fingerprint, layout, base, limits)
        check_cost(settings, layout.numbers, condition)
        with torch.device("meta"):
            model = Cvae(settings, layout.numbers, condition)
        shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parts = layout.counts()
        for number in range(len(names)):
            sizes = {"condition": model.condition, "mean": len(parts), "std": len(parts), "latent": model.latent}
            shapes |= {f"task.{number}.{part}": (size,) for part, size in sizes.items()}
        file.require(shapes)
        state = {name: file.read(f"model.{name}") for name in model.state_dict()}
        model.load_state_dict(state, strict=False, assign=True)  # torch wants a count of batches, which we do not keep
        tasks = {name: _task(file, number) for number, name in enumerate(names)}
    return Generator(fingerprint, layout, model.eval(), tasks, digest or canonical.digest_file(path))


def _parts(task: Task) -> dict[str, torch.Tensor]:
    statistics = {"mean": task.statistics.mean, "std": task.statistics.std}
    return {"condition": task.condition, **statistics, "latent": task.latent}


def _task(file: Container, number: int) -> Task:
    found = {part: file.read(f"task.{number}.{part}") for part in ("condition", "mean", "std", "latent")}
    if bool((found["std"] < 0).any()):
        file.refuse(f"`task.{number}.std` has negative numbers")
    return Task(found["condition"], Statistics(found["mean"], found["std"]), found["latent"])


def _told(file: Container) -> tuple[str, Layout, IcmSettings, int, list[str]]:
    """Fingerprint, layout, the model's settings, numbers of a condition, and the tasks' names."""
    told: Any = file.told
    try:
        if told["schema"] != SCHEMA:
            file.refuse(f"its schema is {shorten(str(told['schema']), 20)}, and this server reads {SCHEMA}")
        layout, settings = Layout.from_json(told["layout"]), IcmSettings.from_json(told["settings"])
        condition, names, fingerprint = told["condition"], told["tasks"], told["base"]
        if type(condition) is not int or not 1 <= condition <= MAX_CONDITION or type(fingerprint) is not str:
            file.refuse("its condition has no size, or its base no fingerprint")
        check_tasks(names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        file.refuse(f"its header is no generator's ({shorten(str(error), 80)})")
    return fingerprint, layout, settings, condition, names


def check_tasks(names: Any) -> None:
    """Raises ValueError unless these are names of tasks."""
    if not isinstance(names, list) or not all(type(name) is str for name in names) or len(set(names)) < len(names):
        raise ValueError("tasks have names, each its own")
    if not 1 <= len(names) <= MAX_TASKS:
        raise ValueError(f"there are 1 to {MAX_TASKS} tasks")
    if not all(name.isprintable() and 1 <= len(name) <= MAX_TASK_NAME for name in names):
        raise ValueError(f"a task's name has 1 to {MAX_TASK_NAME} printable characters")


def _check_base(fingerprint: str, layout: Layout, base: BaseSpec | None, limits: Limits) -> None:
    if base is None:
        return
    if fingerprint != base.fingerprint:
        raise AdapterInvalid("The generator was trained for another base than the served one.", code="base_mismatch")
    for module in layout.modules:
        spec = base.modules.get(module.name)
        if spec is None or (spec.in_features, spec.out_features) != (module.inputs, module.outputs):
            text = f"The base has no module `{shorten(module.name)}` of the shape that the generator makes."
            raise AdapterInvalid(text, code="base_mismatch")
        if module.rank > limits.max_rank:
            text = f"The generator makes rank {module.rank}; the server's limit is {limits.max_rank} (`--max-rank`)."
            raise AdapterInvalid(text, code="rank_limit")
    if layout.lora_bytes > limits.form_bytes:
        text = f"The generator makes adapters of {layout.lora_bytes} bytes; the limit is {limits.form_bytes}."
        raise AdapterInvalid(text, code="adapter_too_large")
