"""Work in a process of its own, as a test orders it."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapters_store.errors import AdapterInvalid


def run(folder: Path, order: Mapping[str, Any], progress: Callable[[float], None]) -> dict[str, Any]:
    """`x` says what to do."""
    print("noise that is no message")
    print("more noise", file=sys.stderr)
    (folder / "pid").write_text(str(os.getpid()))
    progress(0.25)
    match order["x"]:
        case "refuse":
            raise AdapterInvalid("No.", code="rank_limit", param="rank")
        case "raise":
            raise RuntimeError("unforeseen")
        case "die":
            os.kill(os.getpid(), 9)
        case "hang":
            time.sleep(600)
    facts = {"nice": os.nice(0), "threads": os.environ["OMP_NUM_THREADS"], "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}
    return {"given": (folder / "given").read_text(), **facts}
