"""kill -9 at random instants: what was acknowledged is there and whole, nothing else shows."""

import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFound
from adapters_store.info import AdapterInfo
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, store_files

Told = dict[str, dict[int, str]]  # name -> version -> acknowledged digest; "-" for a deletion


def kill_after(process: subprocess.Popen[str], round_number: int, chance: random.Random) -> list[list[str]]:
    """Starts an uploader, kills it at a random instant and returns what it had said."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(round_number, file=process.stdin, flush=True)
    ready = process.stdout.readline().split()
    assert ready[0] == "ready"
    lines = [process.stdout.readline().split() for _ in range(chance.randrange(6))]
    for _ in range(chance.randrange(400_000)):
        pass  # any instant of the next upload, not just those after an answer
    os.kill(int(ready[1]), signal.SIGKILL)
    while (line := process.stdout.readline().split())[0] != "died":
        lines.append(line)
    assert int(line[1]) == signal.SIGKILL, "the uploader failed by itself"
    return lines


def check(root: Path, told: Told) -> None:
    """Opens the store as a restarted server does, and compares it with what was acknowledged."""
    store = open_store(str(root))
    assert not list((root / "staging").iterdir())
    registry = AdapterRegistry(store, BASE)
    unheard = 0
    for name in ("n0", "n1", "n2"):
        history = {info.version: info.digest or "-" for info in versions(registry, name)}
        assert {version: history.get(version) for version in told[name]} == told[name]
        assert sorted(history) == list(range(1, len(history) + 1))
        unheard += len(history) - len(told[name])
        told[name] = history
    assert unheard <= 1  # the one whose answer the kill swallowed
    infos, _ = registry.list()
    live = {name for name, history in told.items() if history and history[max(history)] != "-"}
    assert {info.name for info in infos} == live
    for info in infos:
        assert info.warnings == ()
        assert registry.load(info.digest).modules
    assert registry.verify() == frozenset()


def versions(registry: AdapterRegistry, name: str) -> list[AdapterInfo]:
    with suppress(AdapterNotFound):
        return registry.versions(name)
    return []


@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.deep)])
def test_nothing_acknowledged_is_lost(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    told: Told = defaultdict(dict)
    acknowledged = 0
    command = [sys.executable, "-m", "tests.adapters_store.uploader", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for round_number in range(rounds):
            for _, name, version, digest in kill_after(process, round_number, chance):
                told[name][int(version)] = digest
                acknowledged += 1
            check(tmp_path / "store", told)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    assert acknowledged > rounds
    records = [name for name in store_files(tmp_path / "store") if name.startswith("names/")]
    assert len(records) == sum(len(history) for history in told.values())
