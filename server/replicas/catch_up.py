"""Lists the store now and then, so that listings of adapters show what others wrote even without Redis."""

import logging
import threading
import time

from adapters_store.errors import CodedError
from server.replicas.names import SharedNames

FOLDER_SECONDS = 2.0
BUCKET_SECONDS = 30.0  # each listing is a request, or one per 1000 versions, that is paid for
REST = 50  # times as long as a listing took (34 us a version in a folder): at most 2 % of one core go into it
_log = logging.getLogger(__name__)


class CatchUp:
    """One thread."""

    def __init__(self, registry: SharedNames, interval: float) -> None:
        self._registry = registry
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catch-up", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for a listing under way: a bucket may take its time, and nothing depends on it."""
        self._ended.set()

    def _run(self) -> None:
        pause = self._interval
        while not self._ended.wait(pause):
            started = time.monotonic()
            try:
                self._registry.catch_up()
            except (CodedError, OSError) as error:
                _log.warning("store_not_listed", extra={"reason": str(error)})
            pause = max(self._interval, REST * (time.monotonic() - started))
