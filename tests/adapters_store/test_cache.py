"""The disk cache before a bucket: verified, bounded, shared, and never the truth."""

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from adapters_store import canonical
from adapters_store.bucket import Bucket, ObjectDamaged, ObjectMissing
from adapters_store.cache import CachedObjects, CachePlace
from adapters_store.errors import StoreUnavailable
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.places import open_objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.faults import FaultyBucket
from tests.adapters_store.s3 import S3
from tests.adapters_store.support import BASE, factors, write
from tests.adapters_store.test_objects import ObjectsTests

SIZE = 1000


class TestCachedS3(ObjectsTests):
    takes_back = False

    @pytest.fixture
    def objects(self, s3: S3, tmp_path: Path) -> Objects:
        return open_objects(s3.url(), CachePlace(tmp_path / "cache", 10 * SIZE))


class Cached:
    """A cache for three files of SIZE bytes before a bucket of five, which counts its requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bucket = FaultyBucket(MemoryStore())
        self.contents = [bytes([number]) * SIZE for number in range(5)]
        self.digests = [canonical.digest(content) for content in self.contents]
        self.objects = self.again()
        self.objects.publish({self.key(number): content for number, content in enumerate(self.contents)})
        self.bucket.names.clear()

    def again(self) -> CachedObjects:
        return CachedObjects(self.bucket, CachePlace(self.folder, 3 * SIZE))

    def key(self, number: int) -> str:
        return f"blobs/sha256/{self.digests[number]}"

    def read(self, *numbers: int) -> int:
        """Reads files in turn, and returns how many of them were downloaded."""
        before = len(self.bucket.names)
        for number in numbers:
            with self.objects.content(self.key(number), self.digests[number], SIZE) as path:
                assert path.read_bytes() == self.contents[number]
        return len(self.bucket.names) - before

    def kept(self) -> set[int]:
        return {self.digests.index(path.name) for path in (self.folder / "sha256").iterdir()}

    def path(self, number: int) -> Path:
        return self.folder / "sha256" / self.digests[number]


@pytest.fixture
def cached(tmp_path: Path) -> Cached:
    return Cached(tmp_path / "cache")


def test_a_second_read_asks_the_bucket_nothing(cached: Cached) -> None:
    assert cached.read(0, 1) == 2
    assert cached.read(0, 1) == 0
    cached.objects = cached.again()  # nor after a restart
    assert cached.read(0, 1) == 0
    assert not list((cached.folder / "staging").iterdir())


def test_what_was_used_longest_ago_goes_first(cached: Cached) -> None:
    for age, number in enumerate((0, 1, 2)):
        cached.read(number)
        os.utime(cached.path(number), ns=(age, age))
    cached.read(0)
    cached.read(3)
    assert cached.kept() == {0, 2, 3}


def test_a_file_larger_than_the_cache_is_not_kept(cached: Cached) -> None:
    large = os.urandom(4 * SIZE)
    digest = canonical.digest(large)
    cached.objects.publish({"blobs/large": large})
    for _ in range(2):
        with cached.objects.content("blobs/large", digest) as path:
            assert path.read_bytes() == large
            assert not cached.kept()


@pytest.mark.parametrize("rot", [b"", b"x" * SIZE, b"\0" * (SIZE - 1)], ids=["empty", "bits", "cut"])
def test_a_rotten_file_is_dropped_and_fetched_again(cached: Cached, rot: bytes) -> None:
    cached.read(0)
    cached.path(0).write_bytes(rot)
    assert cached.read(0) == 1
    assert cached.path(0).read_bytes() == cached.contents[0]
    assert cached.read(0) == 0


def test_rot_in_the_bucket_is_not_kept(cached: Cached) -> None:
    cached.objects.publish({cached.key(0): b"x" * SIZE})
    with pytest.raises(ObjectDamaged), cached.objects.content(cached.key(0), cached.digests[0], SIZE):
        pytest.fail("the context must not begin")
    assert not cached.kept()
    with pytest.raises(ObjectMissing), cached.objects.content("blobs/none", "0" * 64):
        pytest.fail("the context must not begin")


def test_a_file_in_use_outlives_its_eviction(cached: Cached) -> None:
    cached.read(0)
    with ExitStack() as stack:
        hit = stack.enter_context(cached.objects.content(cached.key(0), cached.digests[0]))
        miss = stack.enter_context(cached.objects.content(cached.key(1), cached.digests[1]))
        for number in (0, 1):
            cached.path(number).unlink()
        cached.again().sweep()
        assert hit.read_bytes() == cached.contents[0]
        assert miss.read_bytes() == cached.contents[1]
    assert not list((cached.folder / "staging").iterdir())


def test_a_file_that_is_still_downloaded_from_blocks_no_other_reader(cached: Cached) -> None:
    with cached.objects.content(cached.key(0), cached.digests[0]):
        other = threading.Thread(target=cached.read, args=(0,), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()


def test_a_bucket_that_is_down_leaves_what_is_kept(cached: Cached) -> None:
    cached.read(0)
    cached.bucket.at, cached.bucket.until = 1, 1 << 30
    assert cached.read(0) == 0
    with pytest.raises(StoreUnavailable):
        cached.read(1)


def test_an_adapter_is_loaded_from_the_cache_alone(tmp_path: Path) -> None:
    bucket = FaultyBucket(MemoryStore())
    registry = AdapterRegistry(Log(CachedObjects(bucket, CachePlace(tmp_path / "cache", 1 << 20))), BASE)
    info, _ = registry.add("legal", *write(tmp_path / "files", factors(1)))
    registry.load(info.digest)
    bucket.names.clear()
    assert registry.load(info.digest).modules
    assert bucket.names == []


def test_a_folder_that_is_gone_or_full_of_strangers_is_no_harm(cached: Cached) -> None:
    (cached.folder / "sha256").rmdir()
    assert cached.read(0, 0) == 2
    (cached.folder / "sha256").mkdir()
    cached.path(1).mkdir()
    assert cached.read(1, 1) == 2


READER = """
import os, random, sys
from pathlib import Path
from obstore.store import LocalStore
from adapters_store.bucket import Bucket
from adapters_store.cache import CachedObjects, CachePlace
root, seed = Path(sys.argv[1]), int(sys.argv[2])
chance, names = random.Random(seed), sorted(path.name for path in (root / "bucket").iterdir())
for _ in range(300):
    objects = CachedObjects(Bucket(LocalStore(root / "bucket")), CachePlace(root / "cache", 3000))
    if chance.random() < 0.1:
        objects.sweep()
    name = chance.choice(names)
    with objects.content(name, name) as path:
        assert len(path.read_bytes()) == 1000
    if chance.random() < 0.05:
        (root / f"rot-{seed}").write_bytes(b"rot")
        (root / f"rot-{seed}").replace(root / "cache" / "sha256" / name)
"""


def test_processes_share_a_cache_while_they_evict_sweep_and_spoil_it(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    for number in range(5):
        content = bytes([number]) * SIZE
        (tmp_path / "bucket" / canonical.digest(content)).write_bytes(content)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for reader in readers:
        _, errors = reader.communicate()
        assert reader.returncode == 0, errors
    assert not list((tmp_path / "cache" / "staging").iterdir())
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "sha256").iterdir()) <= 3 * SIZE


def test_what_is_cached_is_on_this_disk(s3: S3, tmp_path: Path) -> None:
    bucket = s3.open()
    cached = CachedObjects(bucket._bucket, CachePlace(tmp_path / "cache", 1 << 20))
    data = b"content"
    digest = canonical.digest(data)
    key = f"blobs/sha256/{digest}"
    cached.publish({key: data})
    assert cached.bytes_here(key, digest, len(data)) == 0
    with cached.content(key, digest, len(data)):
        pass
    assert cached.bytes_here(key, digest, len(data)) == len(data)
    assert bucket.bytes_here(key, digest, len(data)) == 0


def test_bytes_that_have_come_are_told_while_others_are_on_their_way(tmp_path: Path) -> None:
    data = bytes(range(200))
    digest = canonical.digest(data)
    seen: list[int] = []

    class Slow(Bucket):
        def download(self, key: str, target: Path) -> None:
            for end in (50, 200):
                target.write_bytes(data[:end])
                seen.append(objects.bytes_here(key, digest, len(data)))

    objects = Objects(Slow(MemoryStore()), staging=tmp_path)
    assert objects.bytes_here("blob", digest, len(data)) == 0
    with objects.content("blob", digest, len(data)):
        assert objects.bytes_here("blob", digest, len(data)) == 200
    assert seen == [50, 200]
    assert objects.bytes_here("blob", digest, len(data)) == 0
