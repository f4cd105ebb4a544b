"""The record of changes: whole lines, from several writers, and what happens when it cannot be written."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.quota import QuotaExceeded
from server.access.audit import AuditLog
from server.jobs.job import Job

LINE = ("tenant", "action", "name", "version", "digest", "job", "status", "code")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    for number in range(2):
        AuditLog(path).write({"n": number, "name": "a\nb\u2028", "key": None})
    assert lines(path) == [{"n": number, "name": "a\nb\u2028", "key": None} for number in range(2)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = AuditLog(path)
    audit.write({"n": 1})
    path.rename(tmp_path / "audit.log.1")
    audit.write({"n": 2})
    assert lines(path) == [{"n": 2}]
    assert lines(tmp_path / "audit.log.1") == [{"n": 1}]


def test_a_file_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        AuditLog(tmp_path)


def test_a_line_that_cannot_be_written_is_logged_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    audit = AuditLog(folder / "audit.log")
    (folder / "audit.log").unlink()
    folder.rmdir()
    audit.write({"action": "DELETE /adapters/{name}"})
    assert audit.failures == 1
    assert caplog.records[0].message == "audit_not_written"
    assert caplog.records[0].__dict__["line"] == {"action": "DELETE /adapters/{name}"}


def test_the_end_of_a_job_is_a_line(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    done = Job("acme", "merge", {"name": "new"}, "k")
    done.end("done", {"name": "new", "version": 2, "digest": "d", "new": True})
    failed = Job("globex", "merge", {"name": "other"}, "k")
    failed.end("failed", error=QuotaExceeded("no"))
    for job in (done, failed):
        audit.job_ended(job)
    told = [tuple(line[key] for key in LINE) for line in lines(tmp_path / "audit.log")]
    assert told == [
        ("acme", "job merge", "new", 2, "d", done.id, 200, None),
        ("globex", "job merge", "other", None, None, failed.id, 403, "quota_exceeded"),
    ]


WRITER = """
import sys
from pathlib import Path
from server.access.audit import AuditLog
audit = AuditLog(Path(sys.argv[1]))
for number in range(300):
    audit.write({"writer": sys.argv[2], "number": number, "filler": "x" * (number * 13 % 2000)})
"""


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"{each}"]) for each in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    found = lines(path)
    for writer in range(3):
        assert [line["number"] for line in found if line["writer"] == f"{writer}"] == list(range(300))
