"""The log on every backend: commits, reads that verify, rot."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_store import canonical, records
from adapters_store.errors import AdapterCorrupt, AdapterNotFound, StorageFull, StoreUnavailable
from adapters_store.local import LocalObjects
from adapters_store.log import Log, lost, open_store
from adapters_store.objects import Objects
from adapters_store.records import Blob
from tests.adapters_store.support import store_files
from tests.adapters_store.test_records import MANIFEST

CONTENT = b"0123456789"
BLOB = Blob(canonical.digest(CONTENT), len(CONTENT))
MADE = {**MANIFEST, "blobs": {"adapter_config.json": {"digest": BLOB.digest, "size": BLOB.size}}}
DIGEST = canonical.digest(canonical.dump(MADE))


@pytest.fixture
def log(objects: Objects) -> Log:
    return Log(objects)


def test_commit_and_read_back(log: Log) -> None:
    record = log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    assert record is not None
    assert record.manifest == DIGEST
    assert log.manifest(DIGEST) == MADE
    with log.blob(BLOB) as path:
        assert path.read_bytes() == CONTENT
    assert not lost(record, log.sizes())
    assert lost(record, {}) == {BLOB.digest, DIGEST}


def test_a_version_is_written_once(log: Log) -> None:
    assert log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    assert log.commit("t", "n", 1, "delete") is None
    assert [item.event for item in log.records_of("t", "n")] == ["upload"]


def test_versions_are_read_in_their_numbers_order(log: Log) -> None:
    for version in range(1, 13):
        assert log.commit("t", "n", version, "upload", MADE, {BLOB.digest: CONTENT})
    assert [item.version for item in log.records_of("t", "n")] == list(range(1, 13))
    assert [item.version for item in log.records_of("t", "n", after=10)] == [11, 12]
    assert [item.record.version for item in log.records()] == list(range(1, 13))


def test_records_up_to_a_known_version_are_left_out(log: Log) -> None:
    for name in ("a", "b", "c"):
        for version in range(1, 4):
            assert log.commit("t", name, version, "upload", MADE, {BLOB.digest: CONTENT})
    known = {"a": 1, "b": 3}
    found = log.records(lambda tenant, name: known.get(name, 0) if tenant == "t" else 99)
    assert [(item.name, item.record.version) for item in sorted(found, key=lambda item: item.name)] == [
        ("a", 2),
        ("a", 3),
        ("c", 1),
        ("c", 2),
        ("c", 3),
    ]


def test_a_name_is_no_prefix_of_another(log: Log) -> None:
    for name in ("a", "ab", "a-b"):
        log.commit("t", name, 1, "upload", MADE, {BLOB.digest: CONTENT})
    log.commit("tt", "a", 1, "upload", MADE, {BLOB.digest: CONTENT})
    assert len(log.records_of("t", "a")) == 1
    assert sorted((item.tenant, item.name) for item in log.records()) == [
        ("t", "a"),
        ("t", "a-b"),
        ("t", "ab"),
        ("tt", "a"),
    ]


@pytest.mark.parametrize("digest", ["0" * 64, DIGEST])
def test_an_unknown_manifest(log: Log, digest: str) -> None:
    with pytest.raises(AdapterNotFound, match="does not exist"):
        log.manifest(digest)


@pytest.mark.parametrize("digest", ["", "../../x", "0" * 63, DIGEST.upper()])
def test_what_is_no_digest(log: Log, digest: str) -> None:
    with pytest.raises(AdapterNotFound, match="64 hexadecimal"):
        log.manifest(digest)


@pytest.mark.parametrize("rot", [b"", CONTENT[:-1], CONTENT + b"x", b"012345678X"], ids=["empty", "cut", "long", "bit"])
def test_a_rotten_blob_is_never_read(log: Log, objects: Objects, rot: bytes) -> None:
    log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    objects.publish({f"blobs/sha256/{BLOB.digest}": rot})
    with pytest.raises(AdapterCorrupt) as caught, log.blob(BLOB):
        pytest.fail("the context must not begin")
    assert (caught.value.status, caught.value.code) == (503, "adapter_corrupt")
    short = set() if len(rot) == len(CONTENT) else {BLOB.digest}
    assert lost(log.records_of("t", "n")[0], log.sizes()) == short
    log.restore(MADE, {BLOB.digest: CONTENT})
    with log.blob(BLOB) as path:
        assert path.read_bytes() == CONTENT


def test_a_missing_blob_is_corrupt(log: Log) -> None:
    with pytest.raises(AdapterCorrupt), log.blob(BLOB):
        pytest.fail("the context must not begin")


def test_a_rotten_manifest_is_never_read(log: Log, objects: Objects) -> None:
    log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    objects.publish({f"manifests/sha256/{DIGEST}.json": canonical.dump({**MADE, "rank": {"min": 1, "max": 1}})})
    with pytest.raises(AdapterCorrupt):
        log.manifest(DIGEST)


def test_foreign_files_beside_the_records_are_ignored(log: Log, objects: Objects) -> None:
    log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    objects.publish(
        {f"names/{key}": b"{}" for key in ("t/n/x.json", "t/n/01.json", "t/n/0.json", "t/2.json", "README")}
    )
    assert [(item.name, item.record.version) for item in log.records()] == [("n", 1)]
    assert [item.version for item in log.records_of("t", "n")] == [1]


def test_open_store_sweeps(tmp_path: Path) -> None:
    open_store(str(tmp_path))
    (tmp_path / "staging" / "left").write_bytes(b"x")
    open_store(str(tmp_path))
    assert store_files(tmp_path) == []


@pytest.mark.parametrize("url", ["{}/file/below", "nonsense://x", "s3://"])
def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path, url: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFull, match="cannot be opened"):
        open_store(url.format(tmp_path))


class FailingReads(LocalObjects):
    """Every read fails with one OS error."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self.error = OSError(number, os.strerror(number), "/secret/path")

    def get(self, key: str) -> bytes:
        raise self.error

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        if self.error.errno:
            raise self.error
        yield self._root


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE])
def test_an_error_that_passes_is_no_damage(tmp_path: Path, number: int) -> None:
    Log(LocalObjects(tmp_path)).commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    log = Log(FailingReads(tmp_path, number))
    for read in (lambda: log.manifest(DIGEST), log.records, lambda: log.records_of("t", "n"), lambda: enter(log)):
        with pytest.raises(StoreUnavailable) as caught:
            read()
        assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
        assert "secret" not in caught.value.message


def test_a_failing_disk_is_damage(tmp_path: Path) -> None:
    Log(LocalObjects(tmp_path)).commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    log = Log(FailingReads(tmp_path, errno.EIO))
    for read in (lambda: log.manifest(DIGEST), lambda: enter(log)):
        with pytest.raises(AdapterCorrupt):
            read()
    assert [item.event for item in log.records_of("t", "n")] == [records.UNREADABLE]


def enter(log: Log) -> None:
    with log.blob(BLOB):
        pytest.fail("the context must not begin")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_errors_of_a_blobs_user_are_not_the_blobs(log: Log, number: int) -> None:
    log.commit("t", "n", 1, "upload", MADE, {BLOB.digest: CONTENT})
    theirs = OSError(number, os.strerror(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught, log.blob(BLOB):
        raise theirs
    assert caught.value is theirs
