"""Adapters for related tasks: what is trained, that it is the same again, and the table of what compression loses."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deploy.examples import related
from server.model.base import BaseModel
from server.model.loader import load_base_model
from tests.bench.related import METHODS, applied, distributions, error, read, rows_of

STEPS, COUNT = 2, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the script: more threads give other sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("related")
    made = related.train_sets(folder, STEPS, COUNT)
    assert [path.relative_to(folder) for path in made] == [
        Path(name) / task.name for name, tasks in related.sets() for task, _ in tasks[:COUNT]
    ]
    return folder


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model("smollm2", dtype=torch.float32)


def test_sets() -> None:
    sets = dict(related.sets())
    assert list(sets) == ["related-own", "related-equal", "unrelated-own", "unrelated-equal"]
    for name, tasks in sets.items():
        assert len({task.name for task, _ in tasks}) == len(related.FORMS)
        assert len({seed for _, seed in tasks}) == (len(tasks) if name.endswith("own") else 1)


def test_related_tasks_have_one_prompt_and_many_answers() -> None:
    tasks = [related.date_task(number) for number in range(len(related.FORMS))]
    items = [related.date_task(number).make(random.Random(1), "train") for number in range(len(tasks))]
    assert len({item.prompt for item in items}) == 1
    assert len({item.answer for item in items}) == len(tasks)


def test_equal_starts_are_equal_and_own_ones_are_not(trained: Path) -> None:
    first, second = (related.date_task(number).name for number in range(2))

    def factors(set_: str, task: str) -> torch.Tensor:
        tensors = load_file(trained / set_ / task / "adapter_model.safetensors")
        name = min(name for name in tensors if "lora_A" in name)
        found: torch.Tensor = tensors[name].float()
        return found

    equal = torch.nn.functional.cosine_similarity(
        factors("related-equal", first).flatten(), factors("related-equal", second).flatten(), dim=0
    )
    own = torch.nn.functional.cosine_similarity(
        factors("related-own", first).flatten(), factors("related-own", second).flatten(), dim=0
    )
    assert equal > 0.5 > abs(own)


def test_what_is_there_is_left_as_it_is(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    related.train_sets(trained, STEPS, COUNT)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")} == before


def test_the_table(trained: Path, base: BaseModel) -> None:
    name, tasks = next(related.sets())
    found = dict(rows_of(base, trained / name, [task for task, _ in tasks[:COUNT]], probes=2))
    assert list(found) == [*METHODS, "no adapter"]
    assert found["as they are"][1:] == pytest.approx([0.0, 0.0, 1.0], abs=1e-12)
    size, lost, kl, same = found["int8"]
    assert size < found["as they are"][0] * 0.6
    assert 0 < lost < 0.02
    assert kl < 1e-3
    assert same > 0.9
    assert found["int8"][1] < found["int4"][1] < 0.2
    # Two adapters of rank 8 fit a basis of rank 16 whole; half of that loses something, diagonal cores more.
    assert found["JD-Full, rank 16"][1] < 1e-3 < found["JD-Full, rank 8"][1] < 1
    assert found["JD-Full, rank 16"][1] <= found["JD-Diag, rank 16"][1]
    assert found["no adapter"][1] == 1.0
    assert found["no adapter"][2] > 0


def test_an_adapter_is_applied_and_taken_off(trained: Path, base: BaseModel) -> None:
    name, tasks = next(related.sets())
    adapter = read(trained / name / tasks[0][0].name, base)
    rows = [(torch.tensor([[1, 2, 3, 4]]), 0)]
    bare = distributions(base.model, {}, rows)
    assert not torch.equal(distributions(base.model, adapter, rows), bare)
    with pytest.raises(RuntimeError, match="inside"), applied(base.model, adapter):
        raise RuntimeError("inside")
    assert torch.equal(distributions(base.model, {}, rows), bare)
    assert error(adapter, adapter) == pytest.approx(0, abs=1e-12)
