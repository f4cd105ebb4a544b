"""What clients of several servers asked and were answered, and whether one history of each name explains it all.

A version is known to be there from when its write was answered, and may be there from when that write began. A read
may thus see any version from the newest that was answered `bound` seconds before it began (at once on the server that
wrote it) up to the newest whose write began before it ended.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

TICK = 0.002  # the store notes times in whole milliseconds


@dataclass(frozen=True)
class Operation:
    """One call. kind: upload, delete, rollback or read; times in seconds since 1970.

    version, digest: as answered; None and "" for 404 (a read), for a deletion, and where nothing was answered.
    lost: the server died under it, so that it may or may not have happened. changed: it wrote a version, which is not
    told of a rollback: one that found its content current already is a read, as is a deletion that found nothing.
    """

    server: int
    kind: str
    name: str
    start: float
    end: float
    version: int | None = None
    digest: str = ""
    changed: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Version:
    """One line of a name's log, and the operation that wrote it, where one was answered."""

    number: int
    digest: str
    created: float
    write: Operation | None
    begun: float


def check(operations: Sequence[Operation], logs: Mapping[str, Sequence[Mapping[str, Any]]], bound: float) -> None:
    """logs: name -> the versions that `GET /adapters/{name}/versions` told at the end. Fails with what is wrong."""
    for name in {operation.name for operation in operations}:
        mine = [operation for operation in operations if operation.name == name]
        log = _explained(name, mine, logs.get(name, ()))
        _in_real_time(name, log)
        writes = [version.write for version in log]
        reads = [operation for operation in mine if _reads(operation) and operation not in writes]
        for read in reads:
            _check_read(read, log, bound)
        _monotonic(name, reads)


def _reads(operation: Operation) -> bool:
    told = operation.version is not None or operation.kind in ("read", "delete")
    return told and not operation.changed and not operation.lost


def _explained(name: str, operations: Sequence[Operation], told: Iterable[Mapping[str, Any]]) -> list[Version]:
    """The log in order, each version with its write; every write that was answered must be there, and no other."""
    writes = [each for each in operations if each.changed or each.lost or (each.kind == "rollback" and each.version)]
    log: list[Version] = []
    for line in sorted(told, key=lambda line: int(line["version"])):
        created = datetime.fromisoformat(line["created"]).timestamp()
        deletion = line["kind"] == "deleted"

        def fits(
            write: Operation, deletion: bool = deletion, created: float = created, line: Mapping[str, Any] = line
        ) -> bool:
            same = deletion or write.lost or (write.version, write.digest) == (line["version"], line["digest"])
            return (write.kind == "delete") == deletion and same and write.start - TICK <= created <= write.end + TICK

        fitting = [write for write in writes if fits(write)]
        found = sorted(fitting, key=lambda write: (write.lost, not write.changed, write.end))
        assert found, f"{name}@{line['version']} was written by nobody who asked for it"
        writes.remove(found[0])
        write = None if found[0].lost else found[0]
        log.append(Version(int(line["version"]), line["digest"], created, write, found[0].start))
    assert [version.number for version in log] == list(range(1, len(log) + 1)), f"{name} has gaps"
    unseen = [write for write in writes if write.changed]
    assert not unseen, f"acknowledged and not in the log: {unseen}"
    return log


def _in_real_time(name: str, log: Sequence[Version]) -> None:
    for earlier, later in pairwise(log):
        if earlier.write and later.write:
            assert earlier.write.start <= later.write.end, f"{name}: {later} was answered before {earlier} began"


def _check_read(read: Operation, log: Sequence[Version], bound: float) -> None:
    floor = ceiling = 0
    for version in log:
        if version.write is not None:
            delay = 0.0 if version.write.server == read.server else bound
            floor = version.number if version.write.end + delay <= read.start else floor
        ceiling = version.number if version.begun - TICK <= read.end else ceiling
    if read.version is None:
        absent = {0, *(version.number for version in log if not version.digest)}
        assert any(floor <= number <= ceiling for number in absent), f"404 between {floor} and {ceiling}: {read}"
        return
    assert floor <= read.version <= ceiling, f"not between {floor} and {ceiling}: {read}"
    assert log[read.version - 1].digest == read.digest, f"another content than the log's: {read}"


def _monotonic(name: str, reads: Iterable[Operation]) -> None:
    """No server goes back in time."""
    seen: dict[int, tuple[float, int]] = {}
    for read in sorted(reads, key=lambda read: read.end):
        if read.version is None:
            continue
        ended, version = seen.get(read.server, (0.0, 0))
        assert read.start < ended or read.version >= version, f"{name}: back from {version}: {read}"
        seen[read.server] = (read.end, max(version, read.version))
