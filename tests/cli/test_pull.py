"""`polyrank pull`: the folder is there whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import Polyrank, peft_folder
from tests.cli.fake_server import FakeServer, error


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_brings_back_what_was_pushed(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    target = tmp_path / "deep" / "copy"
    result = polyrank("pull", "a", target)
    assert result.code == 0
    assert listing(target) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in listing(target))
    assert listing(target.parent) == ["copy"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_both_files_are_of_one_version(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    polyrank("push", "a", peft_folder(tmp_path / "second", b"second"), "--replace")
    assert polyrank("pull", "a@1", tmp_path / "one").code == 0
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == b"weights" * 100
    fake.requests.clear()
    assert polyrank("pull", "a", tmp_path / "two").code == 0
    assert fake.requests[1:] == [
        "GET /adapters/a@2/files/adapter_config.json",
        "GET /adapters/a@2/files/adapter_model.safetensors",
    ]


def test_json(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    result = polyrank("pull", "a", tmp_path / "b", "--json")
    assert json.loads(result.out) == fake.info("a", 1) | {"folder": str(tmp_path / "b")}


def test_never_writes_into_a_folder_in_use(polyrank: Polyrank, fake: FakeServer, folder: Path) -> None:
    polyrank("push", "a", folder)
    before = (folder / "adapter_config.json").stat().st_mtime_ns
    result = polyrank("pull", "a", folder)
    assert result.code == 1
    assert "target_exists" in result.err
    assert (folder / "adapter_config.json").stat().st_mtime_ns == before


def test_an_empty_folder_is_filled(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    (tmp_path / "empty").mkdir()
    assert polyrank("pull", "a", tmp_path / "empty").code == 0
    assert listing(tmp_path / "empty") == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_working_directory_is_filled_and_stays(
    polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polyrank("push", "a", folder)
    here = tmp_path / "here"
    here.mkdir()
    before = here.stat().st_ino
    monkeypatch.chdir(here)
    result = polyrank("pull", "a", ".")
    assert (result.code, result.err) == (0, "")
    assert listing(here) == ["adapter_config.json", "adapter_model.safetensors"]
    assert here.stat().st_ino == before
    assert listing(tmp_path) == ["here", "my-adapter"]


def test_a_folder_that_cannot_be_filled_stays_empty(
    polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polyrank("push", "a", folder)
    (tmp_path / "empty").mkdir()
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.name == "adapter_config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    result = polyrank("pull", "a", tmp_path / "empty")
    assert (result.code, listing(tmp_path / "empty")) == (1, [])
    assert result.err == f"error: {tmp_path / 'empty' / 'adapter_config.json'}: permission denied\n"


def test_refusal_leaves_nothing(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse = error(503, "adapter_corrupt", "A stored file changed.")
    assert polyrank("pull", "a", tmp_path / "b").code == 1
    assert listing(tmp_path) == []


def test_ctrl_c_leaves_nothing(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    fake.before_weights = threading.Event()
    command = [sys.executable, "-m", "server", "pull", "a", str(tmp_path / "b")]
    process = subprocess.Popen(command, env=os.environ | {"POLYRANK_URL": fake.url}, preexec_fn=_heed_ctrl_c)
    try:
        assert fake.before_weights.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert listing(tmp_path) == ["my-adapter"]


def _heed_ctrl_c() -> None:
    """A test run in the background of a shell inherits an ignored SIGINT, and so would the command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
