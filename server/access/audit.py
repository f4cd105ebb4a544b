"""The record of changes: one JSON line each, appended to a file. Never a key, never a prompt."""

import errno
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.jobs.job import Job

_log = logging.getLogger(__name__)


class AuditLog:
    """Thread-safe, and several processes may share the file. It is opened for each line: it can be moved away."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be written."""
        self._path = path.expanduser()
        self.failures = 0
        os.close(self._open())

    def write(self, fields: Mapping[str, Any]) -> None:
        """Blocking. A line that cannot be written goes to the log instead: what it tells of is done already."""
        line = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        try:
            descriptor = self._open()
            try:
                written = os.write(descriptor, line)  # in one piece: lines of several writers do not mix
            finally:
                os.close(descriptor)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301
        except OSError as error:
            self.failures += 1
            _log.error("audit_not_written", extra={"reason": error.strerror, "line": dict(fields)})

    def job_ended(self, job: Job) -> None:
        """The line of a job's end; who has ordered it stands in the line that has the same `job`."""
        made = job.result or {}
        self.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": None,
                "key": None,
                "tenant": job.tenant,
                "action": f"job {job.kind}",
                "name": made.get("name", job.order.get("name")),
                "version": made.get("version"),
                "digest": made.get("digest"),
                "job": job.id,
                "status": job.error.status if job.error is not None else 200,
                "code": job.error.code if job.error is not None else None,
            }
        )

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
