"""Forks uploaders on demand, so that fifty of them need one start of Python. Run by the kill test.

Each line on stdin is a round number and starts an uploader, which says `ready <pid>` and then what was acknowledged,
until it is killed; then this process says `died <signal>`.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from adapters_store.errors import AdapterNotFound
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, factors, write


def say(*words: object) -> None:
    """A line in one write: `print` makes several where Python is told not to buffer, and a kill between two of them
    would leave half a line in front of the next one."""
    os.write(sys.stdout.fileno(), f"{' '.join(map(str, words))}\n".encode())


def upload_for_ever(root: Path, round_number: int) -> None:
    registry = AdapterRegistry(open_store(str(root / "store")), BASE)
    say("ready", os.getpid())
    step = 0
    while True:
        step += 1
        name = f"n{step % 3}"
        if step % 5 == 0:
            with suppress(AdapterNotFound):
                registry.delete(name)
                say("deleted", name, registry.versions(name)[0].version, "-")
            continue
        files = write(root / "files", factors(1000 * round_number + step))
        info, _ = registry.add(name, *files, replace=True)
        say("added", name, info.version, info.digest)


def main(root: Path) -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                upload_for_ever(root, int(line))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        say("died", os.WTERMSIG(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
