"""Fetches adapters from the store in the background, while the engine steps on."""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adapters_store.errors import CodedError
from adapters_store.forms import AdapterWeights
from server.engine.adapter_storage import PackedAdapter, pack
from server.errors import EngineFailure

LOADER_THREADS = 2  # reading and packing use one core each; the model needs the rest


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that ended: the packed adapter, or why there is none."""

    digest: str
    adapter: PackedAdapter | None
    error: CodedError | None = None


class AdapterLoader:
    """Loads by digest on its own threads; finished loads are collected with `poll`.

    `load` reads and verifies an adapter (it may block); `on_done` wakes the engine, from a loader thread; pinned: as
    for `pack`.
    """

    def __init__(
        self,
        load: Callable[[str], AdapterWeights],
        embeddings: frozenset[str],
        on_done: Callable[[], None],
        *,
        pinned: bool = False,
    ) -> None:
        self._load = load
        self._embeddings = embeddings
        self._on_done = on_done
        self._pinned = pinned
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="adapter-loader")

    def start(self, digest: str) -> None:
        self._threads.submit(self._run, digest)

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
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, digest: str) -> None:
        try:
            outcome = Loaded(digest, pack(self._load(digest), self._embeddings, pinned=self._pinned))
        except CodedError as error:
            outcome = Loaded(digest, None, error)
        except Exception as error:  # a failed load is an output of the requests that wait for it, not of the engine
            outcome = Loaded(digest, None, EngineFailure(f"The adapter could not be loaded: {type(error).__name__}."))
        self._done.put(outcome)
        self._on_done()
