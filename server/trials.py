"""Adapters that the engine may run before the store holds them, or without its holding them."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from adapters_store.forms import AdapterWeights
from server.engine.request import TRIAL

Load = Callable[[str], AdapterWeights]


class Engine(Protocol):
    """What is needed of the engine."""

    def discard(self, digest: str) -> None: ...


class Trials:
    """Stands between the engine and the store: `load` knows what is on trial, then what `stored` knows."""

    def __init__(self, stored: Load) -> None:
        self._stored = stored
        self._weights: dict[str, AdapterWeights] = {}

    def load(self, digest: str) -> AdapterWeights:
        """The weights of this digest; errors are those of the store. Any thread may ask."""
        return self._weights.get(digest) or self._stored(digest)

    @contextmanager
    def on_trial(self, engine: Engine, weights: AdapterWeights) -> Iterator[str]:
        """A digest under which the engine finds these weights while the context lasts; no other adapter has it.

        Whoever uses it must have ended or aborted its requests before the end, when the engine discards the adapter.
        """
        digest = f"{TRIAL}{secrets.token_hex(16)}"
        self._weights[digest] = replace(weights, digest=digest)
        try:
            yield digest
        finally:
            del self._weights[digest]
            engine.discard(digest)
