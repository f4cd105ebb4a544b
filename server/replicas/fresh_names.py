"""How old an answer from memory may be: a name that was not compared with the store lately is, before it is used.

Whoever writes to the same store may change any name, and Redis, if there is one, may be away, or its writer killed
before it told anyone. So the bound is kept by asking the store itself, ahead of time for names in steady use.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from adapters_store import names
from adapters_store.errors import AdapterInvalid, AdapterNotFound, StoreUnavailable
from adapters_store.lookup import seen_by
from server.errors import Overloaded
from server.replicas.names import SharedNames

BOUND_SECONDS = 2.0  # after a change was acknowledged, no server answers with what was before
AHEAD_SECONDS = 1.0  # a name used at this age is asked for in the background, so that steady use never waits
MISS_SECONDS = 0.5  # an unknown name is asked for again after this time
KNOWN_WAIT_SECONDS = 1.0  # the store's answer is waited for so long before an old answer serves
UNKNOWN_WAIT_SECONDS = 5.0  # there is no old answer for an unknown name
AWAY_SECONDS = 5.0  # after a failure of the store known names do not wait for it
MAX_REMEMBERED = 20_000
MAX_UNKNOWN = 64  # inquiries for unknown names that may wait; who asks for any number of them gets 503
_THREADS = 8
_UNKNOWN_THREADS = 4
_Key = tuple[str, str]  # tenant, name


class FreshNames:
    """Used from the event loop. base_names: by which the base is called."""

    def __init__(
        self, registry: SharedNames, base_names: tuple[str, ...], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._base_names = base_names
        self._clock = clock
        self._checked: OrderedDict[_Key, float] = OrderedDict()  # when the store was asked last, the oldest first
        self._asking: dict[_Key, asyncio.Task[bool]] = {}
        self._unknown = 0
        self._away_until = float("-inf")
        self._threads = ThreadPoolExecutor(_THREADS, "store-check")
        self._unknown_slots = asyncio.Semaphore(_UNKNOWN_THREADS)
        self.checks = 0
        self.failed = 0

    async def ensure(self, reference: str, tenant: str) -> None:
        """Makes the registry's answer for the reference at most BOUND_SECONDS old, if the store answers.

        That is about two names: the tenant's own, and the public one behind it.

        Raises StoreUnavailable or Overloaded, for a name that the registry does not know only.
        """
        name = self._name_in(reference)
        if name is None:
            return
        now = self._clock()
        ages = {(owner, name): now - self._checked.get((owner, name), float("-inf")) for owner in seen_by(tenant)}
        if not any(self._registry.newest(*key) for key in ages):
            await self._ask_for_unknown([key for key, age in ages.items() if age >= MISS_SECONDS])
            return
        asked = {key: self._ask(key) for key, age in ages.items() if age >= AHEAD_SECONDS}
        late = {task for key, task in asked.items() if ages[key] >= BOUND_SECONDS}
        if late and now >= self._away_until:
            _, waiting = await asyncio.wait(late, timeout=KNOWN_WAIT_SECONDS)
            if waiting:
                self._failed_check()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _name_in(self, reference: str) -> str | None:
        """None where nothing can have changed: a digest, or a name that no adapter may have."""
        try:
            parsed = names.parse(reference, *self._base_names)
            if parsed.name is not None:
                names.check_name(parsed.name, *self._base_names)
        except (AdapterNotFound, AdapterInvalid):
            return None
        return parsed.name

    async def _ask_for_unknown(self, keys: Sequence[_Key]) -> None:
        if not keys:
            return
        if self._unknown >= MAX_UNKNOWN and any(key not in self._asking for key in keys):
            raise Overloaded("Too many unknown adapter names are being looked up. Try again soon.")
        tasks = {self._ask(key, self._unknown_slots) for key in keys}
        done, waiting = await asyncio.wait(tasks, timeout=UNKNOWN_WAIT_SECONDS)
        if waiting:
            self._failed_check()
        if waiting or not all(task.result() for task in done):
            raise StoreUnavailable("The adapter store cannot be asked for this name now; try again.")

    def _ask(self, key: _Key, turn: asyncio.Semaphore | None = None) -> "asyncio.Task[bool]":
        """The inquiry for this name that is under way, or a new one: whether the store answered."""
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._inquire(key, turn))
            self._unknown += turn is not None
            task.add_done_callback(lambda _: self._asked(key, turn))
        return task

    def _asked(self, key: _Key, turn: asyncio.Semaphore | None) -> None:
        del self._asking[key]
        self._unknown -= turn is not None

    async def _inquire(self, key: _Key, turn: asyncio.Semaphore | None) -> bool:
        async with turn or nullcontext():
            started = self._clock()
            self.checks += 1
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._registry.refresh_name, *key)
            except Exception:  # whatever the store's fault, the names known go on
                self._failed_check()
                return False
        self._checked[key] = started
        self._checked.move_to_end(key)
        if len(self._checked) > MAX_REMEMBERED:
            self._checked.popitem(last=False)
        self._away_until = float("-inf")
        return True

    def _failed_check(self) -> None:
        self.failed += 1
        self._away_until = self._clock() + AWAY_SECONDS
