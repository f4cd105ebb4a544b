"""A crash at every write, sync, rename and link of every change: what is there afterwards is all old or all new."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFound
from adapters_store.fsck import check
from adapters_store.log import GENERATORS, open_store
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.crasher import CHANGES, generators
from tests.adapters_store.generator_support import write_generator
from tests.adapters_store.support import BASE, factors, write

Crasher = subprocess.Popen[str]
History = dict[str, list[str]]


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    command = [sys.executable, "-m", "tests.adapters_store.crasher"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where `legal` has two versions and `icm` one, and the file of another generator."""
    folder = tmp_path_factory.mktemp("prepared")
    registry = AdapterRegistry(open_store(str(folder / "store")), BASE)
    for seed in (1, 2):
        registry.add("legal", *write(folder / "files", factors(seed)), replace=True)
    first, _ = [write_generator(folder / "files", seed) for seed in (0, 1)]
    generators(registry).add("icm", first, "train", {})
    return folder


def crash(crasher: Crasher, folder: Path, name: str, at: int, when: str) -> bool:
    """Whether there was a call number `at`, at which the change died."""
    assert crasher.stdin is not None
    assert crasher.stdout is not None
    print(folder, name, at, when, file=crasher.stdin, flush=True)
    answer = crasher.stdout.readline().strip()
    assert answer in ("died", "done"), answer
    return answer == "died"


def restart(folder: Path) -> tuple[AdapterRegistry, History]:
    """Opens the store as a restarted server does and checks all that it holds."""
    log = open_store(str(folder / "store"))
    assert not list((folder / "store" / "staging").iterdir())
    registry = AdapterRegistry(log, BASE)
    report = check(log)
    assert report.problems == []
    histories: History = {}
    for name in ("legal", "new"):
        try:
            histories[name] = [info.digest for info in reversed(registry.versions(name))]
        except AdapterNotFound:
            histories[name] = []
    for info in registry.list()[0]:
        assert registry.load(info.digest).modules
    histories["icm"] = [str(record.manifest) for record in log.of(GENERATORS).records_of("public", "icm")]
    kept = generators(registry)
    for found in kept.list()[0]:
        with kept.opened(found) as (generator, _):
            assert generator.tasks
    return registry, histories


@pytest.mark.parametrize("when", ["before", "after", "lost"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_crash_at_every_call(crasher: Crasher, prepared: Path, tmp_path: Path, name: str, when: str) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    before = restart(whole)[1]
    assert not crash(crasher, whole, name, 0, when)
    after = restart(whole)[1]
    assert after != before
    at, made = 0, []
    while True:
        at += 1
        folder = tmp_path / str(at)
        shutil.copytree(prepared, folder)
        if not crash(crasher, folder, name, at, when):
            break
        registry, found = restart(folder)
        assert found in (before, after)
        made.append(found == after)
        if not made[-1]:
            CHANGES[name](registry, folder / "files")  # said again, it is made
            assert restart(folder)[1] == after
        shutil.rmtree(folder)
    assert (
        len(made)
        >= {"upload": 20, "replace": 20, "delete": 6, "make": 15, "rollback": 10, "generator": 15, "forget": 6}[name]
    )
    assert made == sorted(made)  # one call is the commit
    if when == "lost":
        assert made[-1]  # and the last sync acknowledges it
    print(f"{name}, {when}: {len(made)} crash points, committed at {made.index(True) + 1 if True in made else 'none'}")
