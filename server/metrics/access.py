"""The API keys and the record of changes, where there are any."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.access.key import KeyState
from server.metrics import names
from server.metrics.families import single


class AccessCollector(Collector):
    """keys, audit_failures: None where the server has no keys, or keeps no record."""

    def __init__(self, keys: Callable[[], KeyState] | None, audit_failures: Callable[[], int] | None) -> None:
        self._keys = keys
        self._audit_failures = audit_failures

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if self._keys is not None:
            state = self._keys()
            yield single(names.API_KEYS, state.active)
            yield single(names.API_KEYS_STALE, state.stale)
        if self._audit_failures is not None:
            yield single(names.AUDIT_FAILURES, self._audit_failures())
