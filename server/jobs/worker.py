"""`python -m server.jobs.worker`: does one piece of work that `server.jobs.process` writes to stdin, and tells.

The lines of stdout are JSON objects: `progress`, then `error` or `done`. What the work prints goes to stderr.
"""

import contextlib
import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from adapters_store.errors import CodedError
from server.jobs.process import TOLD

NICE = 19
LEAST = 0.005  # of the progress: less is not told


def main() -> None:
    _step_back()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    said = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    shown = 0.0

    def tell(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")

    def progress(done: float) -> None:
        nonlocal shown
        if done - shown >= LEAST:
            shown = done
            tell(progress=done)

    try:
        folder = Path(said["folder"])
        told = importlib.import_module(said["module"]).run(folder, said["order"], progress)
        (folder / TOLD).write_text(json.dumps(told))
    except CodedError as error:
        fields = {"message": error.message, "status": error.status, "code": error.code, "param": error.param}
        tell(error=fields)
    else:
        tell(done=True)


def _step_back() -> None:
    """The engine goes first: where the system can, this runs on cores that nobody else wants."""
    os.nice(NICE)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_the_server() -> None:
    sys.stdin.read()  # until the server closes it, or is gone
    os._exit(1)


if __name__ == "__main__":
    main()
