"""Names of our keys in Redis, and what stands in the stream of changes."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.names import NAME
from adapters_store.places import is_remote

_CHANGE = re.compile(rb"([A-Za-z0-9][A-Za-z0-9_-]{0,63})/(" + NAME[1:-1].encode() + rb")")
_VERSION = re.compile(rb"[1-9][0-9]{0,9}")
LOOK = b"look"  # the field of an entry that tells of no single name: the index says more than it did


@dataclass(frozen=True, slots=True)
class Change:
    """Version `version` of a tenant's name has been appended. Both are safe path segments."""

    tenant: str
    name: str
    version: int

    @property
    def member(self) -> str:
        """As the index of names has it."""
        return f"{self.tenant}/{self.name}"

    def entry(self) -> dict[Any, Any]:
        """The fields of an entry of the stream, in the types that redis-py asks for."""
        return {"name": self.member, "version": self.version}


def change_of(fields: Mapping[bytes, bytes]) -> Change | None:
    """The change that an entry of the stream tells of; None for anything else, whoever wrote it."""
    return read_change(fields.get(b"name", b""), fields.get(b"version", b""))


def read_change(member: bytes, version: bytes) -> Change | None:
    found, number = _CHANGE.fullmatch(member), _VERSION.fullmatch(version)
    return Change(found[1].decode(), found[2].decode(), int(number[0])) if found and number else None


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of all servers over one store. Other stores, and other programs, may use the same Redis."""

    prefix: str

    @classmethod
    def of_store(cls, url: str) -> "Keys":
        """Servers share what they know if they name their store alike: the same URL, or the same absolute folder."""
        place = url if is_remote(url) or url.startswith("memory:") else str(Path(url.removeprefix("file://")).resolve())
        return cls("polyrank:" + hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16])

    @property
    def changes(self) -> str:
        """Stream: an entry for each version of a name."""
        return f"{self.prefix}:changes"

    @property
    def index(self) -> str:
        """Sorted set: tenant/name, by its newest version. A version's digest never changes: the store tells it."""
        return f"{self.prefix}:names"

    @property
    def members(self) -> str:
        """Set: ids of servers that may be alive."""
        return f"{self.prefix}:replicas"

    def member(self, identity: str) -> str:
        """String that expires: what a server tells of itself, as JSON."""
        return f"{self.prefix}:replica:{identity}"

    def rate(self, limit: str, client: str, window: int) -> str:
        """Integer that expires: requests or tokens of a client in a window."""
        return f"{self.prefix}:rate:{limit}:{client}:{window}"
