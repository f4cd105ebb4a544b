"""What references mean to a tenant: its own adapters, and behind them the public ones."""

from difflib import get_close_matches
from typing import NamedTuple

from adapters_store import names
from adapters_store.errors import AdapterNotFound, CodedError
from adapters_store.index import Index
from adapters_store.names import PUBLIC, Reference
from adapters_store.records import Record


class PublicAdapter(CodedError):
    """A tenant wants to change an adapter that it may only read (403)."""

    status = 403
    code = "public_adapter"


def public(name: str) -> PublicAdapter:
    text = f"`{name}` is public: only a key of the tenant `{PUBLIC}`, or an admin in its place, may change it."
    return PublicAdapter(text, param="name")


class Found(NamedTuple):
    """A version and whose it is."""

    name: str
    record: Record
    tenant: str


def seen_by(tenant: str) -> tuple[str, ...]:
    """Whose adapters a tenant sees, those first that go before others of the same name."""
    return (tenant,) if tenant == PUBLIC else (tenant, PUBLIC)


class Lookup:
    """Thread-safe; in memory. A name that the tenant has itself hides the public one, with all its versions."""

    def __init__(self, index: Index, base_names: tuple[str, ...]) -> None:
        self._index = index
        self._base_names = base_names

    def find(self, reference: str, tenant: str) -> Found:
        """Raises AdapterNotFound, for another tenant's adapter as for one that nobody has."""
        parsed = names.parse(reference, *self._base_names)
        for owner in seen_by(tenant):
            if parsed.digest is not None:
                held = self._index.by_digest(owner, parsed.digest)
                record = self._index.version(owner, *held) if held else None
                if held and record is not None:
                    return Found(held[0], record, owner)
            elif parsed.name is not None and self._index.current(owner, parsed.name) is not None:
                return self._version(reference, parsed, parsed.name, owner, tenant)
        raise self.missing(reference, parsed.name, parsed.version, tenant)

    def page(self, tenant: str, cursor: str | None, limit: int) -> tuple[list[Found], str | None]:
        """Current versions by name, beginning behind `cursor`, and the cursor of the next page or None."""
        owners = seen_by(tenant)
        names_ = sorted({name for owner in owners for name in self._index.names(owner, cursor or "", limit + 1)})
        found = [each for name in names_[:limit] if (each := self._current(name, tenant)) is not None]
        return found, names_[limit - 1] if len(names_) > limit else None

    def versions(self, name: str, tenant: str) -> list[Found]:
        """All versions, the newest first: of the tenant's own name if it ever used it. Raises AdapterNotFound."""
        names.require_name(name)
        for owner in seen_by(tenant):
            if records := self._index.versions(owner, name):
                return [Found(name, record, owner) for record in reversed(records)]
        raise names.not_found(name, self._near(name, tenant))

    def missing(self, reference: str, name: str | None, version: int | None, tenant: str) -> AdapterNotFound:
        """Says of a deleted name of the tenant's own how to have it back, of any other which names are near."""
        if name is None:
            return names.not_found(reference)
        versions = self._index.versions(tenant, name)
        kept = [record.version for record in versions if record.manifest is not None]
        if kept and versions[-1].deleted and version in (None, *kept):
            return names.deleted(reference, name, version or kept[-1])
        return names.not_found(reference, self._near(name, tenant))

    def require_own(self, name: str, tenant: str) -> None:
        """Raises PublicAdapter for a name that the tenant sees, but does not have."""
        if tenant != PUBLIC and not self._index.versions(tenant, name) and self._index.current(PUBLIC, name):
            raise public(name)

    def _version(self, reference: str, parsed: Reference, name: str, owner: str, tenant: str) -> Found:
        record = self._index.current(owner, name)
        if parsed.version is not None:
            record = self._index.version(owner, name, parsed.version)
        if record is None or record.deleted:
            raise self.missing(reference, name, parsed.version, tenant)
        return Found(name, record, owner)

    def _current(self, name: str, tenant: str) -> Found | None:
        for owner in seen_by(tenant):
            if record := self._index.current(owner, name):
                return Found(name, record, owner)
        return None

    def _near(self, name: str, tenant: str) -> list[str]:
        found = {near for owner in seen_by(tenant) for near in self._index.near(owner, name)}
        return get_close_matches(name, sorted(found), n=3)
