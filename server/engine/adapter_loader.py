"""Fetches adapters from the store in the background, while the engine steps on."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from adapters_store.errors import CodedError
from adapters_store.forms import AdapterWeights
from adapters_store.histogram import Histogram
from server.engine.host_cache import HostCache
from server.engine.packing import PackedAdapter
from server.errors import EngineFailure, EngineStopped

FORGET_SECONDS = 10.0  # a failed reading is no reason against a prefetch for longer
FAILURES_KEPT = 1000
LOAD_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LOADER_THREADS = 2  # reading and packing use one core each; the model needs the rest


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that ended: the packed adapter, or why there is none."""

    digest: str
    adapter: PackedAdapter | None
    error: CodedError | None = None


@dataclass(slots=True)
class LoadSeconds:
    """Times since the start, by phase: reading and checking files (fetching them first, where they are in a bucket),
    laying factors out, and writing them to their place in the pool."""

    read: Histogram = field(default_factory=lambda: Histogram(LOAD_BOUNDS))
    pack: Histogram = field(default_factory=lambda: Histogram(LOAD_BOUNDS))
    place: Histogram = field(default_factory=lambda: Histogram(LOAD_BOUNDS))


class AdapterLoader:
    """Loads by digest on its own threads, through host memory; finished loads are collected with `poll`.

    `load` reads and verifies an adapter (it may block); `on_done` wakes the engine, from a loader thread. An adapter is
    read once however many ask for it meanwhile.
    """

    def __init__(
        self,
        load: Callable[[str], AdapterWeights],
        pack: Callable[[AdapterWeights], PackedAdapter],
        on_done: Callable[[], None],
        host: HostCache,
    ) -> None:
        self.host = host
        self.seconds = LoadSeconds()
        self.load = load
        self._pack = pack
        self._on_done = on_done
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._reading: dict[str, Future[PackedAdapter]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._last_bytes = 1
        self._failed: dict[str, float] = {}  # when a reading failed
        self._threads = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="adapter-loader")
        self._prefetching = ThreadPoolExecutor(1, thread_name_prefix="adapter-prefetch")

    def start(self, digest: str) -> None:
        """Begin a load that `poll` will tell of: at once if host memory has the adapter."""
        kept = self.host.get(digest)
        if kept is not None:
            self._done.put(Loaded(digest, kept))
        else:
            self._threads.submit(self._run, digest)

    def prefetch(self, digests: Iterable[str]) -> None:
        """Bring adapters into host memory, on a thread that no load waits for. Any thread may ask; nobody is told.

        Nothing is read that host memory would not keep, as far as the adapter read last tells, nor what failed lately.
        """
        if self.host.limit < self._last_bytes:
            return
        for digest in digests:
            with self._lock:
                failed = digest in self._failed and time.monotonic() - self._failed[digest] < FORGET_SECONDS
                if digest not in self.host and digest not in self._reading and not failed:
                    self._prefetching.submit(self._read, digest, self._announce(digest))

    def poll(self) -> list[Loaded]:
        """Loads that have ended since the last call."""
        ended = []
        while not self._done.empty():
            ended.append(self._done.get())
        return ended

    @property
    def has_ended(self) -> bool:
        """True if `poll` would return something."""
        return not self._done.empty()

    def close(self) -> None:
        """End the threads; a load under way is finished, those not begun are not."""
        self._closed = True  # a promise that was given is broken, not forgotten: a thread may wait for it
        self._prefetching.shutdown(wait=True)
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, digest: str) -> None:
        with self._lock:
            promise = self._reading.get(digest)
            kept = self.host.get(digest) if promise is None else None  # a prefetch may have ended since `start`
            if promise is None and kept is None:
                promise = self._announce(digest)
        if promise is not None:
            self._read(digest, promise)
        try:
            outcome = Loaded(digest, kept if promise is None else promise.result())
        except CodedError as error:
            outcome = Loaded(digest, None, error)
        except Exception as error:  # a failed load is an output of the requests that wait for it, not of the engine
            outcome = Loaded(digest, None, EngineFailure(f"The adapter could not be loaded: {type(error).__name__}."))
        self._done.put(outcome)
        self._on_done()

    def _announce(self, digest: str) -> Future[PackedAdapter]:
        """Under the lock: whoever wants this adapter from now on waits for this reading of it."""
        self._reading[digest] = Future()
        return self._reading[digest]

    def _read(self, digest: str, promise: Future[PackedAdapter]) -> None:
        """Keep the promise, unless another thread does: a load overtakes the prefetches before its own."""
        with self._lock:
            if promise.running() or promise.done():
                return
            promise.set_running_or_notify_cancel()
        try:
            self._check_open()
            started = time.monotonic()
            weights = self.load(digest)
            read = time.monotonic()
            adapter = self.host.put(self._pack(weights))
            self._last_bytes = adapter.num_bytes
            packed = time.monotonic()
        except BaseException as error:
            self._note_failure(digest)
            self._forget(digest)
            promise.set_exception(error)
            return
        self._forget(digest)
        with self._lock:
            self.seconds.read.observe(read - started)
            self.seconds.pack.observe(packed - read)
        promise.set_result(adapter)

    def _note_failure(self, digest: str) -> None:
        with self._lock:
            if len(self._failed) >= FAILURES_KEPT:
                self._failed.clear()
            self._failed[digest] = time.monotonic()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStopped("The engine is stopping.")

    def _forget(self, digest: str) -> None:
        with self._lock:
            del self._reading[digest]
