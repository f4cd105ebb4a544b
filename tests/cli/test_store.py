"""`polyrank fsck` and `polyrank gc` on a folder."""

import json
import os
import time
from pathlib import Path

import pytest

from adapters_store.log import Log, open_store
from tests.adapters_store.test_records import MANIFEST
from tests.cli.conftest import Polyrank

CONTENT = b"content"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One adapter, and a file of none that is a day and an hour old."""
    folder = tmp_path / "store"
    filled(open_store(str(folder)))
    orphan = folder / "blobs" / "sha256" / ("0" * 64)
    orphan.write_bytes(b"orphan")
    old = time.time() - 25 * 3600
    os.utime(orphan, (old, old))
    return folder


def filled(log: Log) -> None:
    from adapters_store.canonical import digest

    blobs = {"adapter_config.json": {"digest": digest(CONTENT), "size": len(CONTENT)}}
    assert log.commit("public", "legal", 1, "upload", {**MANIFEST, "blobs": blobs}, {digest(CONTENT): CONTENT})


def blob(store: Path) -> Path:
    return next(path for path in (store / "blobs" / "sha256").iterdir() if path.name != "0" * 64)


def test_a_sound_store(polyrank: Polyrank, store: Path) -> None:
    result = polyrank("fsck", "--store", store)
    assert result.code == 0
    assert result.out.splitlines()[0].startswith("1 versions, 2 files (")
    assert result.out.splitlines()[0].endswith(", 0 problems")
    assert result.out.splitlines()[1:] == ["1 more files belong to no version: see `polyrank gc`"]


def test_damage_is_told_and_fails(polyrank: Polyrank, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_STORE", str(store))
    blob(store).write_bytes(b"conTent")
    result = polyrank("fsck")
    assert result.code == 1
    assert result.out.startswith("public/legal@1  file ")
    assert "(blob_damaged)" in result.out
    result = polyrank("fsck", "--json")
    assert result.code == 1
    told = json.loads(result.out)
    assert [problem["code"] for problem in told["problems"]] == ["blob_damaged"]
    assert (told["versions"], told["files"], told["unreferenced"]) == (1, 2, 1)


def test_collection_is_shown_before_it_is_done(polyrank: Polyrank, store: Path) -> None:
    key = f"blobs/sha256/{'0' * 64}"
    listed = polyrank("gc", "--store", store)
    assert listed.out == f"{key}  6 B\n1 files (6 B) belong to no version; remove them with --delete\n"
    assert polyrank("gc", "--store", store, "--grace-hours", "26").out == "0 files (0 B) belong to no version\n"
    assert (store / key).exists()
    told = json.loads(polyrank("gc", "--store", store, "--delete", "--json").out)
    assert (told["removed"], told["bytes"], [file["key"] for file in told["files"]]) == (True, 6, [key])
    assert not (store / key).exists()
    assert blob(store).read_bytes() == CONTENT
    assert polyrank("gc", "--store", store, "--delete").out == "0 files (0 B) removed\n"


@pytest.mark.parametrize("command", ["fsck", "gc"])
def test_what_is_no_store(polyrank: Polyrank, tmp_path: Path, command: str) -> None:
    result = polyrank(command, "--store", tmp_path)
    assert (result.code, result.err) == (1, f"error: {tmp_path}: no such file or directory: no adapter store\n")
    assert list(tmp_path.iterdir()) == []
    assert polyrank(command, "--store", "memory://").code == 2
    assert polyrank(command, "--store", "ftp://x").code == 2


@pytest.mark.parametrize("command", ["fsck", "gc"])
def test_a_store_with_nothing_in_it(polyrank: Polyrank, tmp_path: Path, command: str) -> None:
    open_store(str(tmp_path / "store"))
    result = polyrank(command, "--store", tmp_path / "store")
    assert (result.code, result.out) == (1, "")
    assert f"there is nothing at {tmp_path / 'store'}" in result.err
    assert "check the address" in result.err


def test_a_store_whose_only_file_belongs_to_nobody_is_not_empty(polyrank: Polyrank, tmp_path: Path) -> None:
    """What a first upload that failed left, younger than the grace."""
    log = open_store(str(tmp_path / "store"))
    log._objects.publish({f"blobs/sha256/{'0' * 64}": b"orphan"})
    assert polyrank("gc", "--store", tmp_path / "store").code == 0
    found = polyrank("fsck", "--store", tmp_path / "store")
    assert (found.code, found.out.splitlines()[1]) == (0, "1 more files belong to no version: see `polyrank gc`")


def test_a_grace_that_an_upload_could_outlast_is_refused(polyrank: Polyrank, store: Path) -> None:
    assert polyrank("gc", "--store", store, "--grace-hours", "0.5").code == 2
