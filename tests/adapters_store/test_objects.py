"""What every object store must do, told once; each backend inherits it, with raw access that goes around the store."""

import errno
import os
import threading
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from adapters_store.bucket import ObjectMissing
from adapters_store.errors import StorageFull, StoreUnavailable, write_error
from adapters_store.local import LocalObjects
from adapters_store.objects import Objects
from adapters_store.places import is_remote, open_objects
from tests.adapters_store.faults import FaultyBucket, os_error
from tests.adapters_store.s3 import S3

RECORD = ("names/t/n/1.json", b"one")


class ObjectsTests:
    """The contract. A backend's fixture gives the objects; `raw_*` see the store behind them.

    takes_back: a failed publish leaves none of its objects; on a shared remote store others may rely on them already.
    """

    takes_back = True

    def raw(self, objects: Objects) -> dict[str, bytes]:
        store = objects._bucket.store
        keys = [item["path"] for batch in obstore.list(store) for item in batch]
        return {key: bytes(obstore.get(store, key).bytes()) for key in keys}

    def raw_set(self, objects: Objects, key: str, data: bytes) -> None:
        obstore.put(objects._bucket.store, key, data)

    def test_publishes_objects_and_record(self, objects: Objects, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(os.urandom(6 << 20))  # a bucket gets it in two parts
        assert objects.publish({"blobs/a": b"bytes", "blobs/b": source}, RECORD)
        assert self.raw(objects) == {"blobs/a": b"bytes", "blobs/b": source.read_bytes(), RECORD[0]: b"one"}

    def test_reads_what_others_wrote(self, objects: Objects) -> None:
        self.raw_set(objects, "blobs/x", b"theirs")
        assert objects.get("blobs/x") == b"theirs"
        assert objects.exists("blobs/x")
        with objects.file("blobs/x") as path:
            assert path.read_bytes() == b"theirs"

    def test_a_missing_object(self, objects: Objects) -> None:
        assert not objects.exists("blobs/x")
        with pytest.raises(ObjectMissing):
            objects.get("blobs/x")
        with pytest.raises(ObjectMissing), objects.file("blobs/x"):
            pass

    def test_a_record_is_written_once(self, objects: Objects) -> None:
        assert objects.publish({}, RECORD)
        assert not objects.publish({}, (RECORD[0], b"two"))
        assert objects.get(RECORD[0]) == b"one"

    def test_a_lost_race_leaves_nothing_of_the_loser(self, objects: Objects) -> None:
        objects.publish({"blobs/kept": b"1"}, RECORD)
        before = self.raw(objects)
        assert not objects.publish({"blobs/kept": b"1", "blobs/new": b"2"}, (RECORD[0], b"two"))
        assert self.raw(objects) == (before if self.takes_back else {**before, "blobs/new": b"2"})

    def test_one_of_many_racing_writers_wins(self, objects: Objects) -> None:
        won: list[int] = []
        start = threading.Barrier(8)

        def write(number: int) -> None:
            start.wait()
            if objects.publish({f"blobs/{number}": bytes([number])}, (RECORD[0], bytes([number]))):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = won
        kept = [winner] if self.takes_back else range(8)
        assert self.raw(objects) == {f"blobs/{n}": bytes([n]) for n in kept} | {RECORD[0]: bytes([winner])}

    def test_objects_may_be_written_again_and_without_record(self, objects: Objects) -> None:
        self.raw_set(objects, "blobs/a", b"rotten")
        assert objects.publish({"blobs/a": b"sound"})
        assert self.raw(objects) == {"blobs/a": b"sound"}

    def test_sizes_lists_a_prefix(self, objects: Objects) -> None:
        objects.publish({"blobs/a": b"1", "blobs/b/c": b"22", "other/a": b"3"})
        assert objects.sizes("blobs/") == {"blobs/a": 1, "blobs/b/c": 2}
        assert objects.sizes("nothing/") == {}

    def test_a_source_that_cannot_be_read_leaves_nothing(self, objects: Objects, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable):
            objects.publish({"blobs/a": b"1", "blobs/b": tmp_path / "absent"}, RECORD)
        assert self.raw(objects) == ({} if self.takes_back else {"blobs/a": b"1"})


class TestMemory(ObjectsTests):
    @pytest.fixture
    def objects(self) -> Objects:
        return open_objects("memory://")


class TestLocal(ObjectsTests):
    @pytest.fixture
    def objects(self, tmp_path: Path) -> Objects:
        return LocalObjects(tmp_path / "store")

    def raw(self, objects: Objects) -> dict[str, bytes]:
        root = objects._root  # type: ignore[attr-defined]
        files = [path for path in root.rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    def raw_set(self, objects: Objects, key: str, data: bytes) -> None:
        path = objects._root / key  # type: ignore[attr-defined]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class TestS3(ObjectsTests):
    """GCS and Azure take the same path through obstore, with a create-if-absent of their own."""

    takes_back = False

    @pytest.fixture
    def objects(self, s3: S3) -> Objects:
        return s3.open()

    def test_a_retried_write_of_the_record_is_a_success(self, objects: Objects) -> None:
        """The first attempt arrived but its answer was lost: the retry finds its own bytes."""
        self.raw_set(objects, *RECORD)
        assert objects.publish({}, RECORD)

    def test_proves_itself(self, objects: Objects) -> None:
        for _ in range(2):
            objects.prove()
        assert list(self.raw(objects)) == ["store.json"]


@pytest.mark.parametrize(("at", "after"), [(3, False), (3, True), (4, False), (4, True), (5, False)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_is_507_and_leaves_nothing(at: int, number: int, after: bool) -> None:
    bucket = FaultyBucket(MemoryStore(), at, after=after)  # behind two questions whether the blobs are there
    bucket.error = lambda: os_error(number)
    objects = Objects(bucket, shared=False)
    with pytest.raises(StorageFull) as caught:
        objects.publish({"blobs/a": b"1", "blobs/b": b"2"}, RECORD)
    assert (caught.value.status, caught.value.code) == (507, "storage_full")
    assert objects.sizes("") == {}
    assert objects.publish({"blobs/a": b"1", "blobs/b": b"2"}, RECORD)


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (errno.ENOSPC, 507, "full"),
        (errno.EDQUOT, 507, "full"),
        (errno.EIO, 507, "failing"),
        (errno.EMFILE, 503, "Too many open files"),
        (errno.EACCES, 503, "Permission denied"),
        (errno.ESTALE, 503, "now"),
    ],
)
def test_the_reason_is_told_without_a_path(number: int, status: int, word: str) -> None:
    error = write_error(OSError(number, "text", "/secret/path"))
    assert error.status == status
    assert word in error.message
    assert "secret" not in error.message


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_folder_by_path_or_url(tmp_path: Path, form: str) -> None:
    objects = open_objects(form.format(tmp_path / "s"))
    assert isinstance(objects, LocalObjects)
    objects.publish({"blobs/a": b"1"})
    assert (tmp_path / "s" / "blobs" / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://bucket/prefix", "S3Store"),
        ("gs://bucket/prefix", "GCSStore"),
        ("az://container/prefix", "AzureStore"),
    ],
)
def test_a_bucket_url_gives_a_remote_store(url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    objects = open_objects(url)
    assert type(objects) is Objects
    assert is_remote(url)
    assert type(objects._bucket.store).__name__ == kind
    assert objects._bucket.store.prefix == "prefix"
