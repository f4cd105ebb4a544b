"""Forks changes of a store that end at a chosen system call, so that hundreds of them need one start of Python.

Each line on stdin is `folder change at when`: the change is made in a child, which dies at its call number `at`,
`before` it or `after` it, or after it with what was not yet synced `lost`, as in a power cut. The answer is one line:
`died`, or `done` if there were fewer calls.
"""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapters_store.generators import Generators
from adapters_store.local import Disk, LocalObjects
from adapters_store.log import Log
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, factors, write

TOLD: dict[str, Any] = {"kind": "lora", "warnings": [], "provenance": {"type": "made"}, "compression": None}


def make(registry: AdapterRegistry, _: Path) -> None:
    """A version of forms that the server has made, as by compression (and one day by merging)."""
    weights = registry.load(registry.versions("legal")[-1].digest)
    registry.add_forms("legal", weights.modules, "compress", TOLD, replace=True)


def generators(registry: AdapterRegistry) -> Generators:
    return Generators(registry._log, BASE)


CHANGES: dict[str, Callable[[AdapterRegistry, Path], object]] = {
    "upload": lambda registry, files: registry.add("new", *write(files, factors(3))),
    "replace": lambda registry, files: registry.add("legal", *write(files, factors(3)), replace=True),
    "delete": lambda registry, files: registry.delete("legal"),
    "make": make,
    "rollback": lambda registry, files: registry.rollback("legal", 1),
    "generator": lambda registry, files: generators(registry).add(
        "icm", files / "generator-1", "train", {}, replace=True
    ),
    "forget": lambda registry, _: generators(registry).delete("icm"),
}
DIED = 9
Loss = tuple[Path, Callable[[], object]]  # what must be synced, and what happens if it is not
T = TypeVar("T")


class DyingDisk(Disk):
    """Ends the process at one call. Keeps, for each file and name, how to lose it until it is synced."""

    def __init__(self, at: int, when: str) -> None:
        self._calls, self._at, self._when = 0, at, when
        self._unsynced: list[Loss] = []

    def create(self, path: Path) -> int:
        return self._called(lambda: Disk.create(self, path), (path.parent, lambda: path.unlink(missing_ok=True)))

    def write(self, descriptor: int, data: bytes) -> None:
        """Lost data leave a file of the right name that is empty."""
        path = _path(descriptor)
        self._called(lambda: Disk.write(self, descriptor, data), (path, lambda: os.truncate(descriptor, 0)))

    def sync(self, descriptor: int) -> None:
        """Counted, not done: no test cuts the power."""
        self._called(lambda: self._synced(_path(descriptor)))

    def mkdir(self, path: Path) -> None:
        self._called(lambda: Disk.mkdir(self, path), (path.parent, lambda: shutil.rmtree(path)))

    def replace(self, source: Path, target: Path) -> None:
        old = target.read_bytes() if target.exists() else None
        lose: Callable[[], object] = target.unlink if old is None else partial(target.write_bytes, old)
        self._called(lambda: Disk.replace(self, source, target), (target.parent, lose))

    def link(self, source: Path, target: Path) -> None:
        self._called(lambda: Disk.link(self, source, target), (target.parent, target.unlink))

    def _synced(self, path: Path) -> None:
        self._unsynced = [item for item in self._unsynced if item[0] != path]

    def _called(self, call: Callable[[], T], *unsynced: Loss) -> T:
        self._calls += 1
        if self._calls == self._at and self._when == "before":
            os._exit(DIED)
        result = call()
        self._unsynced += unsynced
        if self._calls == self._at:
            for _, lose in reversed(self._unsynced if self._when == "lost" else []):
                lose()
            os._exit(DIED)
        return result


def _path(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def change(folder: Path, name: str, at: int, when: str) -> None:
    registry = AdapterRegistry(Log(LocalObjects(folder / "store", DyingDisk(at, when))), BASE)
    CHANGES[name](registry, folder / "files")


def main() -> None:
    for line in sys.stdin:
        folder, name, at, when = line.split()
        child = os.fork()
        if child == 0:
            try:
                change(Path(folder), name, int(at), when)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {0: "done", DIED: "died"}.get(code, f"failed {code}")
        os.write(sys.stdout.fileno(), f"{answer}\n".encode())


if __name__ == "__main__":
    main()
