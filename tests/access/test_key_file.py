"""The file of keys: its owner's alone, always whole, changed by several at a time."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from server.access.key import Keyring, KeysInvalid, TenantQuota, encode
from server.access.key_file import KeyFile
from tests.support.api_keys import ApiKeys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def one_more(ring: Keyring) -> Keyring:
    return ring.with_quota(f"t{len(ring.quotas)}", TenantQuota())


def test_a_file_is_made_for_its_owner_alone_and_stays_so(path: Path) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):
            KeyFile(path).change(one_more)
            assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
    finally:
        os.umask(before)
    assert sorted(each.name for each in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]
    assert len(KeyFile(path).read().quotas) == 2


def test_a_file_that_everybody_may_write_to_is_not_believed(path: Path) -> None:
    KeyFile(path).change(one_more)
    path.chmod(0o622)
    with pytest.raises(KeysInvalid, match="chmod 600"):
        KeyFile(path).read()


def test_a_change_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeyFile(path)
    file.change(one_more)
    before = path.read_bytes()

    def refuse(ring: Keyring) -> Keyring:
        raise LookupError

    with pytest.raises(LookupError):
        file.change(refuse)
    for call in ("fsync", "open"):
        real = getattr(os, call)

        def fail(*arguments: object, call: str = call, real: object = real) -> object:
            if call == "fsync" or str(arguments[0]).endswith(".new"):
                raise OSError(28, "No space left on device")
            return real(*arguments)  # type: ignore[operator]

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space"):
                file.change(one_more)
        assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))
    path.write_bytes(b"{")
    with pytest.raises(KeysInvalid):  # nobody's keys are thrown away because they cannot be read
        file.change(one_more)
    assert path.read_bytes() == b"{"


def test_what_a_dead_writer_left_is_no_obstacle(path: Path) -> None:
    path.with_name(".keys.json.new").write_bytes(b"half")
    KeyFile(path).change(one_more)
    assert len(KeyFile(path).read().quotas) == 1


def test_a_reader_sees_the_old_keys_or_the_new_ones(path: Path) -> None:
    """At every step of a change: the file is replaced, never written to."""
    file = KeyFile(path)
    file.change(one_more)
    seen: list[int] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(len(KeyFile(path).read().quotas))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", look)
        file.change(one_more)
    assert seen == [1, 2]  # before the replacement, and after it


def test_a_link_stays_a_link(path: Path) -> None:
    """As where an orchestrator mounts the file."""
    real = path.with_name("elsewhere.json")
    path.symlink_to(real.name)
    KeyFile(path).change(one_more)
    assert path.is_symlink()
    assert len(KeyFile(real).read().quotas) == 1


def test_the_stamp_differs_after_each_change(path: Path) -> None:
    file = KeyFile(path)
    assert file.stamp() is None
    seen = set()
    for _ in range(20):
        file.change(one_more)
        assert file.stamp() == file.stamp()
        seen.add(file.stamp())
    assert len(seen) == 20


def test_what_is_no_file_says_so(path: Path) -> None:
    with pytest.raises(KeysInvalid, match="no such file"):
        KeyFile(path).read()
    path.mkdir()
    with pytest.raises(KeysInvalid, match="directory"):
        KeyFile(path).read()


WRITER = """
import sys
from pathlib import Path
from server.access.key import TenantQuota
from server.access.key_file import KeyFile
for number in range(15):
    KeyFile(Path(sys.argv[1])).change(lambda ring: ring.with_quota(f"{sys.argv[2]}-{number}", TenantQuota()))
"""


def test_several_processes_change_it_at_once_and_none_is_lost(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{each}"]) for each in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    wanted = {f"w{writer}-{number}" for writer in range(3) for number in range(15)}
    assert KeyFile(path).read().quotas.keys() == wanted


def test_keys_come_back_as_they_were_written(path: Path) -> None:
    keys = ApiKeys()
    secret = keys.make("generate", tenant="acme")
    KeyFile(path).change(lambda ring: keys.ring)
    assert KeyFile(path).read() == keys.ring
    assert secret not in path.read_text()
    assert encode(keys.ring) == path.read_bytes()
