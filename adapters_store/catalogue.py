"""The names as this process knows them, and as others have changed them in the store meanwhile."""

from collections.abc import Callable

from adapters_store.census import Census, take_census
from adapters_store.histogram import Distribution
from adapters_store.index import Index
from adapters_store.log import Log
from adapters_store.records import Record

Committed = Callable[[str, str, int], None]  # tenant, name, version; may not block


class Catalogue:
    """Thread-safe. committed: is told of every version that this process appends."""

    def __init__(self, store: Log, index: Index, committed: Committed | None = None) -> None:
        self._log = store
        self._index = index
        self._tell = committed

    def appended(self, tenant: str, name: str, record: Record) -> None:
        """This process has appended a version of a name to the store."""
        self._index.put(tenant, name, record)
        if self._tell is not None:
            self._tell(tenant, name, record.version)

    def newest(self, tenant: str, name: str) -> int:
        """Number of the newest version known here, tombstones included; 0 for none. In memory."""
        return self._index.newest(tenant, name)

    def heads(self) -> dict[tuple[str, str], int]:
        """Tenant and name -> number of the newest version known here, tombstones included. In memory."""
        return self._index.heads()

    def digests(self) -> set[str]:
        """The content of every name now, whosever. In memory."""
        return {record.manifest for record in self._index.all_current() if record.manifest is not None}

    def fetch_seconds(self) -> Distribution:
        """Times of downloads from a bucket since the start; none for a folder."""
        return self._log.fetch_seconds()

    def census(self) -> Census:
        """Counts of what every name is now, whosever: looks at the local disk for each, and asks no other machine."""
        return take_census(self._index.all_current(), self._index.sizes(), self._log.share_here)

    def refresh_name(self, tenant: str, name: str) -> bool:
        """Takes in what others have appended to a name; whether there was anything. Raises StoreUnavailable."""
        records = self._log.records_of(tenant, name, after=self._index.newest(tenant, name))
        for record in records:
            self._index.put(tenant, name, record)
        return bool(records)

    def catch_up(self) -> None:
        """Takes in what others have appended to any name: one listing. Raises StoreUnavailable."""
        for item in self._log.records(self._index.newest):
            self._index.put(item.tenant, item.name, item.record)
