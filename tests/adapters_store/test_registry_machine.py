"""Random operations on two replicas and restarts, against a plain dictionary of histories."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from obstore.store import MemoryStore, from_url

from adapters_store.bucket import Bucket
from adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    OutcomeUnknown,
    PreconditionFailed,
    StorageFull,
    StoreUnavailable,
)
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.faults import FaultyBucket
from tests.adapters_store.s3 import S3
from tests.adapters_store.support import BASE, factors, write
from tests.adapters_store.test_local import FailingDisk

NAMES = st.sampled_from(["a", "b", "b.c"])
SEEDS = st.integers(0, 3)
REPLICAS = st.integers(0, 1)


class RegistryMachine(RuleBasedStateMachine):
    """`histories[name]` lists the seeds of all versions, None for a tombstone; `digests[seed]` is learnt."""

    digests = Bundle("digests")

    @initialize()
    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.root = Path(self._folder.name)
        self.files = {seed: write(self.root / str(seed), factors(seed)) for seed in range(4)}
        self.objects = self.open()
        self.replicas = [AdapterRegistry(Log(self.objects), BASE) for _ in range(2)]
        self.histories: dict[str, list[int | None]] = {}
        self.digest_of: dict[int, str] = {}

    def open(self) -> Objects:
        raise NotImplementedError

    def failing(self, at: int, after: bool) -> Objects:
        """The same store, whose write or request number `at` fails, before or after it took effect."""
        raise NotImplementedError

    def teardown(self) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def current(self, name: str) -> int | None:
        return self.histories[name][-1] if self.histories.get(name) else None

    @rule(target=digests, replica=REPLICAS, name=NAMES, seed=SEEDS, replace=st.booleans())
    def upload(self, replica: int, name: str, seed: int, replace: bool) -> object:
        current = self.current(name)
        if current is not None and current != seed and not replace:
            with pytest.raises(AdapterConflict):
                self.replicas[replica].add(name, *self.files[seed])
            return multiple()
        info, created = self.replicas[replica].add(name, *self.files[seed], replace=replace)
        assert created == (current != seed)
        if created:
            self.histories.setdefault(name, []).append(seed)
        assert info.version == len(self.histories[name])
        assert self.digest_of.setdefault(seed, info.digest) == info.digest
        return info.digest

    @rule(replica=REPLICAS, name=NAMES, seed=SEEDS, digest=digests)
    def upload_if(self, replica: int, name: str, seed: int, digest: str) -> None:
        current = self.current(name)
        if current != seed and (current is None or self.digest_of.get(current) != digest):
            with pytest.raises(PreconditionFailed):
                self.replicas[replica].add(name, *self.files[seed], if_match=digest)
            return
        info, created = self.replicas[replica].add(name, *self.files[seed], if_match=digest)
        if created:
            self.histories[name].append(seed)
            self.digest_of.setdefault(seed, info.digest)
        assert created == (current != seed)

    @rule(replica=REPLICAS, name=NAMES)
    def delete(self, replica: int, name: str) -> None:
        if self.current(name) is None:
            with pytest.raises(AdapterNotFound):
                self.replicas[replica].delete(name)
            return
        self.replicas[replica].delete(name)
        self.histories[name].append(None)

    @rule(replica=REPLICAS, name=NAMES, version=st.integers(1, 5))
    def rollback(self, replica: int, name: str, version: int) -> None:
        history = self.histories.get(name, [])
        if version > len(history) or history[version - 1] is None:
            with pytest.raises(AdapterNotFound):
                self.replicas[replica].rollback(name, version)
            return
        self.replicas[replica].rollback(name, version)
        if history[-1] != history[version - 1]:
            history.append(history[version - 1])

    @rule(name=NAMES, seed=SEEDS, at=st.integers(1, 24), after=st.booleans())
    def upload_while_the_store_fails(self, name: str, seed: int, at: int, after: bool) -> None:
        """Refused or done, never half; only where no answer came may it have been done."""
        before = self.objects.sizes("names/")
        try:
            _, created = AdapterRegistry(Log(self.failing(at, after)), BASE).add(name, *self.files[seed], replace=True)
        except OutcomeUnknown:
            created = self.objects.sizes("names/") != before
        except (StorageFull, StoreUnavailable):
            created = False
            assert self.objects.sizes("names/") == before
        if created:
            self.histories.setdefault(name, []).append(seed)

    @rule(replica=REPLICAS)
    def restart(self, replica: int) -> None:
        self.replicas[replica] = AdapterRegistry(Log(self.objects), BASE)

    @rule(digest=digests)
    def load(self, digest: str) -> None:
        assert self.replicas[0].load(digest).digest == digest

    @invariant()
    def histories_agree(self) -> None:
        for replica in getattr(self, "replicas", []):
            replica.refresh()
            live = sorted(name for name in self.histories if self.current(name) is not None)
            assert [info.name for info in replica.list()[0]] == live
            for name, history in self.histories.items():
                versions = replica.versions(name)
                assert [info.version for info in versions] == list(range(len(history), 0, -1))
                found = [info.digest for info in reversed(versions)]
                known = [
                    self.digest_of.get(seed, found[place]) if seed is not None else ""
                    for place, seed in enumerate(history)
                ]
                assert found == known
                assert all(not info.warnings for info in versions)


class BucketMachine(RegistryMachine):
    """A bucket that other processes write to; `failing` fails one request."""

    def __init__(self, store: object = None) -> None:
        super().__init__()
        self.store = store or MemoryStore()

    def open(self) -> Objects:
        return Objects(Bucket(self.store))

    def failing(self, at: int, after: bool) -> Objects:
        return Objects(FaultyBucket(self.store, at, after=after))


class LocalMachine(RegistryMachine):
    def open(self) -> Objects:
        return LocalObjects(self.root / "store", FailingDisk())  # fails never, but spares the syncs

    def failing(self, at: int, after: bool) -> Objects:
        return LocalObjects(self.root / "store", FailingDisk(at, after=after))


SHORT = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestBucketMachine = BucketMachine.TestCase
TestBucketMachine.settings = SHORT
TestLocalMachine = LocalMachine.TestCase
TestLocalMachine.settings = SHORT


def test_histories_on_s3(s3: S3) -> None:
    class S3Machine(BucketMachine):
        def __init__(self) -> None:
            super().__init__(from_url(s3.url()))

    run_state_machine_as_test(S3Machine, settings=settings(SHORT, max_examples=4))


@pytest.mark.deep
@pytest.mark.parametrize("machine", [LocalMachine, BucketMachine])
def test_long_histories(machine: type[RegistryMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None))
