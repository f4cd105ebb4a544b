"""Files in flight: locked while their writer lives, swept when it is dead, safe from cleaners and strangers."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapters_store.log import open_store
from adapters_store.staging import make_folder, staged_file, sweep


def test_a_staged_file_is_there_until_the_end(tmp_path: Path) -> None:
    with staged_file(tmp_path) as path:
        path.write_bytes(b"x")
        sweep(tmp_path)
        assert path.read_bytes() == b"x"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with staged_file(folder) as path:
            shutil.rmtree(folder.parent)
            assert not path.exists()


def test_a_killed_writers_file_is_swept(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from adapters_store.staging import staged_file\n"
        "with staged_file(Path(sys.argv[1])): print('staged', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"staged\n"
        sweep(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        writer.kill()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sweep_between_creating_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = fcntl.flock, []

    def swept_once(file: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            sweep(tmp_path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", swept_once)
    with staged_file(tmp_path) as path:
        assert path.exists()


def test_nothing_is_left_if_the_file_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="no locks"), staged_file(tmp_path):
        pytest.fail("the context must not begin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_store_sweeps_its_staging_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = "memory://" if kind == "memory" else str(tmp_path / "store")
    folder = open_store(url).staging
    assert folder == (tmp_path / f"polyrank-{os.getuid()}" if kind == "memory" else tmp_path / "store" / "staging")
    (folder / "left").write_bytes(b"x")
    assert open_store(url).staging == folder
    assert not list(folder.iterdir())


def test_a_strangers_folder_in_a_public_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "staging"
    make_folder(folder)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    make_folder(folder)
    tmp_path.chmod(0o1777)
    with pytest.raises(PermissionError):
        make_folder(folder)
