"""What a tenant may keep in the store, and the room for what is being written."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapters_store import canonical
from adapters_store.errors import CodedError
from adapters_store.index import Index


class QuotaExceeded(CodedError):
    """The tenant has as much as it may have (403)."""

    status = 403
    code = "quota_exceeded"


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds of a tenant, None for none. adapters: names that are not deleted; bytes: of the weights of all versions
    that the store keeps, each content once. Replaced and deleted ones count: they can be gone back to, so they stay."""

    adapters: int | None = None
    bytes: int | None = None


QuotaOf = Callable[[str], Quota | None]  # by tenant


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version about to be written: its name, the digest of its manifest, the bytes of its weights."""

    name: str
    digest: str
    size: int

    @classmethod
    def of(cls, name: str, manifest: Mapping[str, Any]) -> "Wanted":
        return cls(name, canonical.digest(canonical.dump(manifest)), manifest["bytes"])


def no_quota(tenant: str) -> Quota | None:
    """Of stores whose tenants may keep what they like."""
    return None


class Quotas:
    """Thread-safe. Exact among the threads of one process: what they are writing counts from before they write it.

    Other processes over the store are seen through the index only, so that each may exceed a quota by what the others
    have written since this one heard of it.
    """

    def __init__(self, index: Index, quota_of: QuotaOf, what: str = "adapters") -> None:
        self._what = what  # they are called in messages
        self._index = index
        self._quota_of = quota_of
        self._lock = threading.Lock()
        self._writing: dict[str, list[Wanted]] = {}  # by tenant

    def check(self, tenant: str, wanted: Iterable[Wanted]) -> None:
        """Raises QuotaExceeded if there is no room for all of them now."""
        with self._lock:
            self._check(tenant, wanted)

    @contextmanager
    def room(self, tenant: str, wanted: Wanted) -> Iterator[None]:
        """Holds the room for a version while it is written and put into the index. Raises QuotaExceeded."""
        with self._lock:
            self._check(tenant, [wanted])
            self._writing.setdefault(tenant, []).append(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._writing[tenant].remove(wanted)

    def _check(self, tenant: str, wanted: Iterable[Wanted]) -> None:
        quota = self._quota_of(tenant)
        if quota is None:
            return
        index, more = self._index, list(wanted)
        coming = [*self._writing.get(tenant, ()), *more]
        usage = index.usage(tenant)
        names = {each.name for each in coming if index.current(tenant, each.name) is None}
        sizes = {each.digest: each.size for each in coming if not index.has(tenant, each.digest)}
        adapters, size = usage.adapters + len(names), usage.bytes + sum(sizes.values())
        # What takes no more room than there is taken passes, even where a quota was lowered since.
        grows = any(each.name in names for each in more)
        if grows and quota.adapters is not None and adapters > quota.adapters:
            raise QuotaExceeded(
                f"This tenant has {usage.adapters} {self._what} and may have {quota.adapters}. Delete one, or have its "
                "quota raised (`polyrank keys quota`)."
            )
        grows = any(each.digest in sizes and each.size for each in more)
        if grows and quota.bytes is not None and size > quota.bytes:
            raise QuotaExceeded(
                f"This tenant keeps {usage.bytes} bytes of {self._what}, this needs {size - usage.bytes} more, and "
                f"{quota.bytes} are allowed. Replaced and deleted versions are kept and count. Have the quota raised "
                "(`polyrank keys quota`)."
            )
