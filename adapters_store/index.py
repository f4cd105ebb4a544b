"""The names and versions of the store, in memory: every look-up takes microseconds."""

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Container, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from adapters_store.records import Record

_Holder = tuple[bool, str, str, int]  # whether it is the name's current version, when it was made, name, version
_NEIGHBOURS = 16  # names on either side that are compared with a misspelt one


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has. adapters: names that are not deleted; bytes: of the weights of all versions, deleted ones too,
    each content once."""

    adapters: int
    bytes: int


class Index:
    """Thread-safe. A look-up by name takes no lock: a name's versions are one immutable tuple, replaced whole."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, str], tuple[Record, ...]] = {}
        # (tenant, digest) -> versions with that content in order of preference, the best last
        self._holders: dict[tuple[str, str], list[_Holder]] = {}
        self._live: dict[str, list[str]] = {}  # tenant -> names that are not deleted, sorted
        self._bytes: dict[str, int] = {}  # tenant -> bytes of its contents, each once

    def put(self, tenant: str, name: str, record: Record) -> None:
        """Takes in a record. Records of a name may come in any order, and twice."""
        with self._lock:
            before = self._versions.get((tenant, name), ())
            known = {old.version: old for old in before}
            known[record.version] = record
            ordered = tuple(known[version] for version in sorted(known))
            self._versions[tenant, name] = ordered
            touched = {record.version, ordered[-1].version, *(old.version for old in before[-1:])}
            for digest, holder in _holders(name, before, touched):
                self._holders[tenant, digest].remove(holder)
            for digest, holder in _holders(name, ordered, touched):
                if (tenant, digest) not in self._holders:
                    self._holders[tenant, digest] = []
                    self._bytes[tenant] = self._bytes.get(tenant, 0) + known[holder[3]].info.bytes
                insort(self._holders[tenant, digest], holder)
            self._set_live(tenant, name, live=not ordered[-1].deleted)

    def versions(self, tenant: str, name: str) -> tuple[Record, ...]:
        """All versions in order, tombstones included; empty if the name was never used."""
        return self._versions.get((tenant, name), ())

    def current(self, tenant: str, name: str) -> Record | None:
        """The newest version, or None if the name is free."""
        versions = self.versions(tenant, name)
        return versions[-1] if versions and not versions[-1].deleted else None

    def version(self, tenant: str, name: str, version: int) -> Record | None:
        """One version of a name, tombstones included."""
        versions = self.versions(tenant, name)
        place = bisect_left(versions, version, key=lambda record: record.version)
        return versions[place] if place < len(versions) and versions[place].version == version else None

    def by_digest(self, tenant: str, digest: str) -> tuple[str, int] | None:
        """A name and version of the tenant with this content: a current one if there is any, else the latest.

        Deleted and replaced ones count.
        """
        with self._lock:
            holders = self._holders.get((tenant, digest))
            return holders[-1][2:] if holders else None

    def has(self, tenant: str, digest: str) -> bool:
        """Whether any version of the tenant's has this content, deleted and replaced ones included."""
        return (tenant, digest) in self._holders

    def usage(self, tenant: str) -> Usage:
        with self._lock:
            return Usage(len(self._live.get(tenant, ())), self._bytes.get(tenant, 0))

    def names(self, tenant: str, after: str, limit: int) -> list[str]:
        """Live names in order, beginning behind `after`."""
        with self._lock:
            live = self._live.get(tenant, [])
            start = bisect_right(live, after)
            return live[start : start + limit]

    def near(self, tenant: str, name: str) -> list[str]:
        """Up to three live names that look like `name`. Only its neighbours are compared: 10,000 would take 0.2 s."""
        with self._lock:
            live = self._live.get(tenant, [])
            middle = bisect_left(live, name)
            candidates = live[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]
        return get_close_matches(name, candidates, n=3)

    def all_current(self) -> list[Record]:
        """The newest version of every name of every tenant that is not deleted."""
        with self._lock:
            return [versions[-1] for versions in self._versions.values() if not versions[-1].deleted]

    def sizes(self) -> dict[str, int]:
        """Digest -> bytes of the content of every version there ever was."""
        with self._lock:
            versions = list(self._versions.values())
        return {each.manifest: each.info.bytes for records in versions for each in records if each.manifest}

    def newest(self, tenant: str, name: str) -> int:
        """Number of the newest version, tombstones included; 0 for a name that was never used."""
        versions = self.versions(tenant, name)
        return versions[-1].version if versions else 0

    def heads(self) -> dict[tuple[str, str], int]:
        """Tenant and name -> number of the newest version, tombstones included."""
        with self._lock:
            return {key: versions[-1].version for key, versions in self._versions.items()}

    def _set_live(self, tenant: str, name: str, *, live: bool) -> None:
        names = self._live.setdefault(tenant, [])
        place = bisect_left(names, name)
        present = place < len(names) and names[place] == name
        if live and not present:
            insort(names, name)
        elif present and not live:
            names.pop(place)


def _holders(name: str, versions: Sequence[Record], wanted: Container[int]) -> list[tuple[str, _Holder]]:
    """Digest and holder of each of the wanted versions that has content."""
    return [
        (record.manifest, (record is versions[-1], record.info.created, name, record.version))
        for record in versions
        if record.manifest is not None and record.version in wanted
    ]
