"""The record of changes: one JSON line each, appended to a file. Never a key, never a prompt."""

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class AuditLog:
    """Thread-safe, and several processes may share the file. It is opened for each line: it can be moved away."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be written."""
        self._path = path
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

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
