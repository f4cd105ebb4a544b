"""A generator of two tasks knows which is which, is the same each time, and refuses what it cannot learn."""

from dataclasses import replace

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.generation import cost, generator_file, training
from adapters_store.generation.conditions import task_vector
from adapters_store.generation.generator import Generator
from adapters_store.generation.icm import IcmSettings
from adapters_store.generation.recipe import draw, expand, make
from adapters_store.generation.training import Sample, TrainSettings, memory_bytes, train
from tests.adapters_store.generation.support import (
    CONDITIONS,
    NOT_PINNED,
    TASKS,
    TINY,
    adapter,
    distance,
    samples,
    trained,
)
from tests.adapters_store.support import BASE

SHORT = TrainSettings(BASE.fingerprint, TINY, epochs=2)


@pytest.fixture
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return generator_file.save(trained().generator, tmp_path_factory.mktemp("icm") / "generator")


@pytest.mark.parametrize("task", TASKS)
def test_each_condition_gives_its_task_and_not_the_other(generator: Generator, task: str) -> None:
    [other] = TASKS.keys() - {task}
    known = generator.tasks[task]
    for z, most in ((known.latent, 0.1), (draw(generator, 3), NOT_PINNED)):
        made = expand(make(generator, known.condition, known.statistics, z=z), generator)
        assert distance(made, TASKS[task]) < most
        assert distance(made, TASKS[other]) > 1
        swapped = expand(make(generator, CONDITIONS[other], known.statistics, z=z), generator)
        assert distance(swapped, TASKS[task]) > 1


def test_the_losses_fall() -> None:
    losses = trained().losses
    assert [loss.epoch for loss in losses] == list(range(1, 251))
    assert losses[-1].reconstruction < 0.05 < 0.5 < losses[0].reconstruction
    assert all(loss.kl >= 0 for loss in losses)


def test_a_task_is_told_by_its_samples() -> None:
    tasks = trained().generator.tasks
    assert list(tasks) == list(TASKS)
    for name, task in tasks.items():
        assert torch.equal(task.condition, CONDITIONS[name])
        assert task.latent.shape == (TINY.latent,)


def test_the_same_seed_gives_the_same_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("icm")
    torch.manual_seed(1)
    drawn = torch.randn(3)
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(1)
        made = train(samples(), replace(SHORT, seed=seed)).generator
        assert torch.equal(torch.randn(3), drawn)  # the caller's numbers are left alone
        digests.append(generator_file.save(made, folder / "file").digest)
    assert digests[0] == digests[1] != digests[2]


def test_progress_goes_up_to_all() -> None:
    told: list[float] = []
    train(samples(), replace(SHORT, epochs=4), told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_pieces_are_learnt_apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """112 numbers in four pieces, the last with zeros at its end: all come back."""
    monkeypatch.setattr(cost, "MIN_GROUP", 1)  # so that few numbers have pieces
    icm = IcmSettings(latent=8, channels=(8, 16), group=30)
    made = train(samples(), TrainSettings(BASE.fingerprint, icm, epochs=300, rate=5e-3)).generator
    assert made.model.pieces == 4
    generator = generator_file.save(made, tmp_path_factory.mktemp("icm") / "file")
    for task, modules in TASKS.items():
        known = generator.tasks[task]
        assert known.latent.shape == (4 * icm.latent,)
        found = expand(make(generator, known.condition, known.statistics, z=known.latent), generator)
        assert distance(found, modules) < 0.35


def sample(task: str = "left", condition: torch.Tensor = CONDITIONS["left"], rank: int = 2) -> Sample:
    return Sample(adapter(1, rank), condition, task)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ([sample()], "too_few_samples"),
        ([], "too_few_samples"),
        ([sample(), sample(rank=3)], "layouts_differ"),
        ([sample(), sample(condition=torch.ones(3))], "bad_condition"),
        ([sample(condition=torch.ones(0))] * 2, "bad_condition"),
        ([sample(condition=torch.ones(2, 2))] * 2, "bad_condition"),
        ([sample(), sample(condition=torch.tensor([1.0, 2.0, 3.0, float("nan")]))], "bad_condition"),
        ([sample(task="")] * 2, "bad_task"),
        ([sample(task="a\nb")] * 2, "bad_task"),
        ([sample(task="a" * 200)] * 2, "bad_task"),
    ],
)
def test_what_cannot_be_learnt(given: list[Sample], code: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        train(given, SHORT)
    assert caught.value.code == code


def test_factors_that_are_not_finite() -> None:
    bad = sample()
    next(iter(bad.modules.values())).a[0, 0] = float("inf")
    with pytest.raises(AdapterInvalid, match="not finite"):
        train([sample(), bad], SHORT)


def test_memory_is_bounded_before_anything_is_allocated() -> None:
    needed = memory_bytes(112, 4, 8, SHORT)
    train(samples(), replace(SHORT, memory=needed))
    with pytest.raises(AdapterInvalid) as caught:
        train(samples(), replace(SHORT, memory=needed - 1))
    assert caught.value.code == "generator_too_large"
    assert memory_bytes(4 << 20, 4096, 100, SHORT) < memory_bytes(8 << 20, 4096, 100, SHORT)


def test_a_batch_never_has_one_row_alone() -> None:
    """Batch normalisation of one row of one number has no spread."""
    rows = training._Rows(torch.randn(9, 8), torch.zeros(9, 1), torch.zeros(9, dtype=torch.long), torch.zeros(9))
    for size in (2, 3, 4, 8, 9, 100):
        sizes = [len(values) for values, _, _ in rows.batches(size, torch.arange(9))]
        assert sum(sizes) == 9
        assert min(sizes) >= min(size, 9)
        assert max(sizes) <= 2 * size - 1


def test_a_task_vector_is_the_mean_over_calls_then_over_examples() -> None:
    torch.manual_seed(0)
    long, short = torch.randn(6, 5), torch.randn(2, 5)
    expected = (long.mean(0) + short.mean(0)) / 2
    assert torch.allclose(task_vector([long, short]), expected, atol=1e-6)
    beams = torch.randn(4, 3, 5)
    assert torch.allclose(task_vector([beams]), beams.mean(0).mean(0), atol=1e-6)
    assert not torch.allclose(task_vector([torch.cat([long, short])]), expected, atol=1e-3)
    for examples in ([], [long, torch.zeros(0, 5)]):
        with pytest.raises(AdapterInvalid) as caught:
            task_vector(examples)
        assert caught.value.code == "bad_condition"
